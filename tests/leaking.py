"""Small runs for tests of what models and updates leak."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fedq import config
from fedq.robustness.outcome import Outcome
from fedq.robustness.subject import Subject
from fedq.simulation import run_experiment

SMALL = (
    "data=digits",
    "model=mlp",
    "model.hidden=[16]",
    "clients=12",
    "clients_per_round=6",
    "local_epochs=5",
    "learning_rate=0.3",
    "rounds=2",
    "engine.workers=1",
    "baseline=false",
)


def subject(path: Path, *overrides: str) -> Subject:
    """Return the subject of a small run, made on first use."""
    if not path.exists():
        run_experiment(config.load([*SMALL, *overrides]), path)
    return Subject.load(path)


def by_name(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    """Return outcomes by name, which are distinct, and JSON as they are."""
    found = list(outcomes)
    for outcome in found:
        text = json.dumps(outcome.to_json(), allow_nan=False)
        assert Outcome.from_json(json.loads(text)) == outcome
    named = {outcome.name: outcome for outcome in found}
    assert len(named) == len(found)
    return named
