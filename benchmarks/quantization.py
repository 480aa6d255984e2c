"""Accuracy of federations of every quantization, beside float and post-training quantization.

    python benchmarks/quantization.py            # three seeds, two tasks; an hour of one core
    python benchmarks/quantization.py --keep     # only cells that the results do not hold yet
    python benchmarks/quantization.py --quick

Every cell is a whole federated run by the main job's path (default codec and downlink), judged on
the test set as deployed. Differences to float are paired by seed: the same partition, cohorts and
initial weights. Intervals are 95 % by Student's t over seeds.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import parser, table, write

from fedq import config, simulation

#: Overrides by name; the first is what the others are compared with.
SCHEMES: dict[str, tuple[str, ...]] = {
    "float": ("quantization=none",),
    "W8A8": ("quantization=int8",),
    "W8A8 PTQ": ("quantization=ptq8",),
    "W4A8": ("quantization=w4a8",),
    "W4A8 PTQ": ("quantization=ptq4",),
    "W2A8 codebook": ("quantization=codebook2",),
    "W2A8 LSQ": ("quantization=lsq2",),
    "W2A8": ("quantization=w2a8",),
    "W2A8 PTQ": ("quantization=ptq4", "quantization.weights.bits=2"),
    "W4A4 LSQ": ("quantization=lsq4",),
    "W4A4 PACT": ("quantization=pact4",),
    "W4A8 APoT": ("quantization=apot4",),
    "W4A8 PoT": ("quantization=pot4",),
    "ternary": ("quantization=ternary",),
    "binary": ("quantization=binary",),
    "mixed 8, 4, 2": ("quantization=mixed",),
}
TASKS: dict[str, tuple[str, ...]] = {
    "mnist5k": ("data=mnist5k", "partition=iid", "clients=20", "rounds=20"),
    "smartwatch": ("data=smartwatch", "partition=iid", "clients=20", "rounds=20"),
}
PLAIN = ("baseline=false", "engine.workers=1", "evaluate_every=1000")
#: Student's t, two-sided 95 %, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def run(overrides: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Return the summary of a federated run, and its CPU time with the worker's."""
    experiment = config.load([*overrides, *PLAIN, f"seed={seed}"])
    folder = Path(tempfile.mkdtemp())
    begin = time.perf_counter()
    try:
        summary = simulation.run_experiment(experiment, folder / "run").summary
    finally:
        shutil.rmtree(folder)
    return {
        "accuracy": summary["accuracy"],
        "accuracy_by_width": summary.get("accuracy_by_width"),
        "seconds": time.perf_counter() - begin,
        "uplink_bytes": summary["uplink_bytes"],
    }


def interval(values: list[float]) -> float:
    """Return the half width of the 95 % interval of a mean; NaN of one value."""
    if len(values) < 2:
        return math.nan
    return STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def rows_of(cells: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Return one row per scheme, and per width of mixed ones."""
    accuracies: dict[str, dict[int, float]] = {}
    for cell in cells:
        if cell["task"] == task:
            by_width = cell["accuracy_by_width"] or {"": cell["accuracy"]}
            for width, accuracy in by_width.items():
                name = f"{cell['scheme']}: {width}" if width else cell["scheme"]
                accuracies.setdefault(name, {})[cell["seed"]] = 100 * accuracy
    reference = accuracies["float"]
    rows = []
    for name, values in accuracies.items():
        differences = [value - reference[seed] for seed, value in values.items()]
        half = interval(differences)
        rows.append(
            {
                "scheme": name,
                "accuracy": f"{statistics.mean(values.values()):.2f}",
                "difference": f"{statistics.mean(differences):+.2f}"
                + ("" if math.isnan(half) else f" ± {half:.2f}"),
                "seeds": len(values),
            }
        )
    return rows


def main() -> None:
    """Run all cells and write the results."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    options.add_argument("--keep", action="store_true", help="go on from the results file")
    options.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    arguments = options.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    schemes = {name: SCHEMES[name] for name in arguments.schemes}
    extra: tuple[str, ...] = ()
    if arguments.quick:
        seeds, extra = range(arguments.seed, arguments.seed + 1), ("rounds=2",)
        schemes = {name: SCHEMES[name] for name in ("float", "W8A8", "mixed 8, 4, 2")}
    cells: list[dict[str, Any]] = []
    if arguments.keep:
        cells = json.loads((arguments.out / "quantization.json").read_text())["cells"]
    known = {(cell["task"], cell["scheme"], cell["seed"]) for cell in cells}
    for seed in seeds:
        for task in arguments.tasks:
            for scheme, overrides in schemes.items():
                if (task, scheme, seed) in known:
                    continue
                cell = run((*TASKS[task], *overrides, *extra), seed)
                cells.append({"task": task, "scheme": scheme, "seed": seed, **cell})
                print(task, scheme, seed, f"{cell['accuracy']:.4f}", flush=True)
        columns = {
            "scheme": "scheme",
            "accuracy": "accuracy, %",
            "difference": "minus float, points",
            "seeds": "seeds",
        }
        text = []
        for task in arguments.tasks:
            settings = " ".join((*TASKS[task], *extra))
            text += [f"## {task}", f"`{settings}`", table(columns, rows_of(cells, task))]
        figures = {"seed": arguments.seed, "cells": cells}
        write(arguments.out, "quantization", "Accuracy by quantization", text, figures)


if __name__ == "__main__":
    main()
