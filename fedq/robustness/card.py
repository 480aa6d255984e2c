"""The card: what a suite of evaluations found on one run, as plain values.

``card.json`` is :meth:`Card.to_json`; its schema is ``docs/card.schema.json``. No torch: a card is
read, compared and drawn without the run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fedq.errors import FedqError
from fedq.results import to_json
from fedq.robustness.outcome import Outcome

#: Of the schema: raised when a reader of the last one would go wrong.
VERSION = 1
NAME = "card.json"
STATEMENT = (
    "Every figure is a bound by the attacks listed and no more: an accuracy under attack is at "
    "most, a leak at least, what is written here. A stronger attack may find worse. This is not a "
    "certificate."
)
#: Families in their order, with their titles.
FAMILIES: Mapping[str, str] = {
    "evasion": "Evasion",
    "corruption": "Corruption",
    "poisoning": "Poisoning",
    "backdoor": "Backdoors",
    "membership": "Membership inference",
    "reconstruction": "Reconstruction",
    "privacy": "Privacy",
    "protocol": "Payload and protocol",
}

#: ``done``: it has outcomes; ``error``: it could not be carried out; ``skipped``: it does not apply
#: to the run; ``missing``: not yet.
State = Literal["done", "error", "skipped", "missing"]
_SEVERITY = {"failed": 0, "invalid": 1, "withheld": 2, "measured": 3, "skipped": 4}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One evaluation's part of a card.

    Attributes:
      key: Unique in the suite: the evaluation's name, numbered if it occurs more than once.
      evaluation: Its name and options.
      family: One of :data:`FAMILIES`.
      seed: That its randomness derives from.
      model_sha256: Of the model that was evaluated.
      state: How far it came.
      reason: Why it is not ``done``.
      cpu_seconds: Of this process and those that it started.
      date: When it ended, ISO 8601 in UTC.
      outcomes: What was found.
    """

    key: str
    evaluation: Mapping[str, Any]
    family: str
    seed: int
    model_sha256: str
    state: State = "missing"
    reason: str = ""
    cpu_seconds: float = 0.0
    date: str = ""
    outcomes: tuple[Outcome, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values; the inverse of :meth:`from_json`."""
        return vars(self) | {"outcomes": [outcome.to_json() for outcome in self.outcomes]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """Return the result of :meth:`to_json`, or of its JSON."""
        outcomes = tuple(Outcome.from_json(outcome) for outcome in values["outcomes"])
        return cls(**{**values, "outcomes": outcomes})

    @property
    def worst_first(self) -> list[Outcome]:
        """The outcomes: broken promises, invalid ones, claims withheld, then the worst figures."""
        return sorted(self.outcomes, key=_rank)


def _rank(outcome: Outcome) -> tuple[int, float]:
    """Return a key that sorts the worst first; what is neither bound keeps its place."""
    badness = 0.5
    if outcome.value is not None and outcome.unit in ("share", "AUC"):
        if outcome.bound == "upper":
            badness = 1 - outcome.value
        elif outcome.bound == "lower":
            badness = outcome.value
    return _SEVERITY[outcome.status], -badness


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a suite found on a run.

    Attributes:
      run: ``name``, ``model_sha256``, ``accuracy`` of the deployed model and ``float_accuracy`` of
        its twin on the test set, ``integer`` (whether integer arithmetic judged), ``config``.
      suite: Its name.
      seed: Of the suite.
      date: Of the card, ISO 8601 in UTC.
      versions: Of the packages.
      hardware: ``cpu``, ``cores``, ``memory_gb``.
      results: One per evaluation of the suite, in its order.
    """

    run: Mapping[str, Any]
    suite: str
    seed: int
    date: str
    versions: Mapping[str, Any]
    hardware: Mapping[str, Any]
    results: tuple[Result, ...]

    @property
    def missing(self) -> list[str]:
        """Evaluations of the suite that have not been done."""
        return [result.key for result in self.results if result.state == "missing"]

    @property
    def counts(self) -> Counter[str]:
        """Outcomes by status; evaluations that could not be carried out count as ``error``."""
        statuses: list[str] = [o.status for r in self.results for o in r.outcomes]
        return Counter(
            statuses + [r.state for r in self.results if r.state in ("error", "skipped")]
        )

    @property
    def broken(self) -> bool:
        """Whether a promise was broken, or an evaluation could not be carried out."""
        return bool(self.counts["failed"] or self.counts["error"])

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values; the inverse of :meth:`from_json`."""
        derived = {
            "schema": VERSION,
            "statement": STATEMENT,
            "complete": not self.missing,
            "missing": self.missing,
        }
        return derived | vars(self) | {"results": [result.to_json() for result in self.results]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Card:
        """Return the card of :meth:`to_json`, or of its JSON.

        Raises:
          FedqError: If it is not a card of this version.
        """
        if values.get("schema") != VERSION:
            raise FedqError(
                f"the card has schema {values.get('schema')}, this is version {VERSION}; "
                "evaluate the run again"
            )
        try:
            plain = {field.name: values[field.name] for field in fields(cls)}
            results = tuple(Result.from_json(result) for result in plain["results"])
            return cls(**{**plain, "results": results})
        except (KeyError, TypeError) as error:
            raise FedqError(f"the card is damaged ({error}); evaluate the run again") from error

    def text(self) -> str:
        """Return ``card.json``."""
        return to_json(self.to_json()) + "\n"


def read_card(path: Path) -> Card:
    """Return the card of a ``card.json``, or of the directory that holds one.

    Raises:
      FedqError: If there is none, or it is damaged.
    """
    file = path / NAME if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FedqError(f"cannot read the card {file}: {error}") from error
    if not isinstance(values, dict):
        raise FedqError(f"{file} is not a card")
    return Card.from_json(values)
