"""A study as one HTML page that needs nothing else: curves, Pareto fronts and the table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from fedq.report.study import Method, Study
from fedq.report.study_plots import AXES, known_costs
from fedq.report.study_tables import HEADERS, SORTED_BY, cells, notes, record

#: Points of a curve that are kept: more than a screen shows.
_POINTS = 120
#: Methods that are shown at first; the others wait in the legend.
_SHOWN = 12
_UNITS = {"simulated_seconds": "seconds", "joules": "joules"}


def page(study: Study, extra: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
      study: What it shows.
      extra: Notes below the table's own.
    """
    costs = [
        {"key": key, "label": AXES[key][0], "unit": _UNITS.get(key, "bytes")}
        for key in known_costs(study)
    ]
    costs.append({"key": "round", "label": "rounds", "unit": "rounds"})
    content = {
        "costs": costs,
        "headers": [
            {"key": key, "label": label, "figure": SORTED_BY[key]} for key, label in HEADERS.items()
        ],
        "notes": [*notes(study), *extra],
        "tasks": [
            {
                "name": task,
                "metric": {
                    "title": study.metric(task).title,
                    "percent": study.metric(task).percent,
                    "higher": study.metric(task).higher_is_better,
                },
                "methods": _methods(study, task, methods),
            }
            for task, methods in study.tasks.items()
        ],
    }
    template = resources.files("fedq.report").joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return template.replace("/*DATA*/", text.replace("<", "\\u003c"))  # no label ends the script


def _methods(study: Study, task: str, methods: Sequence[Method]) -> list[dict[str, Any]]:
    shown = study.prominent(task, _SHOWN)
    styles: dict[Method, int] = {}
    for method in [*shown, *(m for m in methods if m not in shown)]:
        grey = method.is_reference and method.runs[0].is_float
        styles[method] = -1 if grey else sum(style >= 0 for style in styles.values())
    return [
        {
            "label": method.label,
            "style": styles[method],
            "hidden": method not in shown,
            "cells": cells(study, method),
            "record": record(study, method),
            "curve": _thin(method.curve),
            "seeds": [
                {"seed": run.seed, "curve": _thin(run.costs, _POINTS // 2)}
                for run in method.finished
            ]
            if len(method.finished) > 1
            else [],
        }
        for method in methods
    ]


def _thin(curve: Mapping[str, Sequence[float]], most: int = _POINTS) -> dict[str, list[float]]:
    """Return at most some points of a curve, the last one among them."""
    count = len(curve["round"])
    step = max(1, math.ceil(count / most))
    kept = sorted({*range(count - 1, -1, -step)})
    return {key: [_four(values[i]) for i in kept] for key, values in curve.items()}


def _four(value: float) -> float:
    """Return a number with five digits, shortly.

    >>> _four(1234567), _four(0.987654321)
    (1234600, 0.98765)
    """
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() else short
