"""Personalisation: whose layers are whose, and what fine-tuning gains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedq import cli, config
from fedq.data.base import load
from fedq.errors import ConfigError
from fedq.personalise import personalise
from fedq.results import read_summary
from fedq.simulation import run_experiment

FEDERATION = (
    *("data=digits", "clients=6", "clients_per_round=6", "rounds=6", "partition=dirichlet"),
    *("partition.alpha=0.2", "baseline=false", "quantization=none", "engine.workers=1"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("personal") / "run"
    run_experiment(config.load([*FEDERATION, "model=local_head", "model.inner=mlp"]), path)
    return path


def test_own_layers_and_fine_tuning_fit_a_client_s_own_mixture(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = personalise(run, epochs=2)
    assert found.mean("own") > found.mean("shared") + 0.02
    assert found.mean("tuned") > found.mean("shared") + 0.02
    assert found.worst("tuned") <= found.mean("tuned") <= 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert personalise(run, epochs=2) == found


def test_accuracies_are_weighted_to_the_client(run: Path) -> None:
    """Without any step of training all three are of the shared model, and their mean is known."""
    found = personalise(run, epochs=1, learning_rate=0.0)
    for client in found.clients:
        assert client.tuned == client.own
    dataset = load(config.load(list(FEDERATION)).data)
    assert sum(client.examples for client in found.clients) == len(dataset.y_train)
    weights = [client.examples for client in found.clients]
    mixed = np.average([client.shared for client in found.clients], weights=weights)
    summary = read_summary(run)
    assert summary is not None
    # Training and test set have nearly the same classes: digits are drawn evenly.
    assert mixed == pytest.approx(summary["accuracy"], abs=0.02)


def test_the_command_writes_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["personalise", str(run)]) == 0
    said = capsys.readouterr().out
    assert "6 clients" in said
    assert "tuned" in said
    written = json.loads((run / "personal.json").read_text())
    assert len(written["clients"]) == 6
    (run / "personal.json").unlink()
    assert cli.main(["personalise", str(run), "--epochs", "0"]) == 2
    assert "local_epochs must be at least 1" in capsys.readouterr().err
    assert cli.main(["personalise", str(run / "clients")]) == 2


def test_clients_of_several_widths_are_refused(tmp_path: Path) -> None:
    widths = ("quantization=mixed", "quantization.widths=[4,2]", "rounds=1")
    run_experiment(config.load([*FEDERATION, *widths]), tmp_path / "run")
    with pytest.raises(ConfigError, match="several widths"):
        personalise(tmp_path / "run")
