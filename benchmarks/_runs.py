"""Whole federations as benchmarks run them: in this process, into a directory that goes away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedq import config, results, simulation

Record = Mapping[str, Any]


def rounds(overrides: Iterable[str]) -> list[dict[str, Any]]:
    """Run a federation and return the lines of its ``rounds.jsonl``."""
    with tempfile.TemporaryDirectory() as folder:
        simulation.run_experiment(config.load(list(overrides)), Path(folder) / "run")
        return results.read_rounds(Path(folder) / "run")


def total(records: Iterable[Record], key: str) -> float:
    """Return the sum of a figure over rounds."""
    return float(sum(record.get(key) or 0 for record in records))


def to_reach(records: Sequence[Record], accuracy: float, key: str) -> float | None:
    """Return what a figure had come to when a round first ended at an accuracy, None if none did.

    >>> lines = [{"accuracy": 0.5, "joules": 2}, {"accuracy": 0.9, "joules": 3}]
    >>> to_reach(lines, 0.8, "joules"), to_reach(lines, 0.95, "joules")
    (5.0, None)
    """
    for i, record in enumerate(records):
        if (record.get("accuracy") or 0) >= accuracy:
            return total(records[: i + 1], key)
    return None


def best_within(records: Sequence[Record], limit: float, key: str) -> float:
    """Return the best accuracy of the rounds before a figure exceeds a limit."""
    spent, best = 0.0, 0.0
    for record in records:
        spent += record.get(key) or 0
        if spent > limit:
            break
        best = max(best, record.get("accuracy") or 0)
    return best


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Return the mean and the range of a figure over seeds; how many there are, if some lack it.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0, None]), spread([None])
    ('2 (1 to 3)', '1 (1 to 1), 1 of 2 seeds', 'never')
    """
    found = [value for value in values if value is not None]
    if not found:
        return "never"
    mean, low, high = (_short(v, digits) for v in (fmean(found), min(found), max(found)))
    text = f"{mean} ({low} to {high})"
    return text if len(found) == len(values) else f"{text}, {len(found)} of {len(values)} seeds"


def _short(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
