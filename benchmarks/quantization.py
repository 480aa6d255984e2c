"""Accuracy of federations of every quantization, beside float and post-training quantization.

    python benchmarks/quantization.py --words FOLDER   # ten seeds, three tasks; hours of one core
    python benchmarks/quantization.py --seeds 1 --tasks images --schemes ternary binary
    python benchmarks/quantization.py --quick

Every cell is a whole federated run by the main job's path (default codec and downlink), judged on
the test set as deployed, after the last round. Differences to float are paired by seed: the same
partition, cohorts and initial weights. Intervals are 95 % by Student's t over seeds.

One run in float gives the float row and those of post-training quantization: its clients' ranges,
read out in each width. The results file has a record per run, with its date and processor; a rerun
keeps those of the same settings (`--again` does not).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import earlier_cells, parser, table, versus, when_and_where, write

import fedq
from fedq import config, simulation
from fedq.export._source import source
from fedq.results import read_config, read_model

#: Overrides by name. The first trains in float, with quantizers that look on.
SCHEMES: dict[str, tuple[str, ...]] = {
    "float": ("quantization=ptq8",),
    "W8A8": ("quantization=int8",),
    "W4A8": ("quantization=w4a8",),
    "W2A8 codebook": ("quantization=codebook2",),
    "W2A8 LSQ": ("quantization=lsq2",),
    "W2A8": ("quantization=w2a8",),
    "W4A4 LSQ": ("quantization=lsq4",),
    "W4A4 PACT": ("quantization=pact4",),
    "W4A8 APoT": ("quantization=apot4",),
    "W4A8 PoT": ("quantization=pot4",),
    "ternary": ("quantization=ternary",),
    "binary": ("quantization=binary",),
    "mixed 8, 4, 2": ("quantization=mixed",),
}
#: What a float run is read out in: weights of post-training quantization.
PTQ: dict[str, dict[str, Any]] = {
    "W8A8 PTQ": {"name": "linear", "bits": 8},
    "W4A8 PTQ": {"name": "linear", "bits": 4, "range": "mse"},
    "W2A8 PTQ": {"name": "linear", "bits": 2, "range": "mse"},
}
#: What is measured by default; the others on request.
MAIN = ("float", "W8A8", "W4A8", "W2A8 codebook", "W2A8 LSQ")
#: Most points that a scheme may lose.
GOALS = {"W8A8": 0.3, "W4A8": 1.0, "W2A8 codebook": 4.0, "W2A8 LSQ": 4.0}
TASKS: dict[str, tuple[str, ...]] = {
    "images": ("data=mnist5k", "partition=iid", "clients=20", "rounds=20"),
    "activity": (
        *("data=smartwatch", "partition=iid", "clients=20", "rounds=30", "batch_size=32"),
        *("momentum=0.9", "learning_rate=0.06", "learning_rate_end=0.03"),
    ),
    # Group normalisation: with one speaker per client, averaged batch statistics swing.
    "keywords": (
        *("experiment=keyword_spotting", "data.seconds=0.5", "data.held_out=15", "rounds=60"),
        *("model.norm=group", "batch_size=16", "local_epochs=1", "learning_rate_end=0.03"),
    ),
}
PLAIN = ("baseline=false", "engine.workers=1", "evaluate_every=1000")


def run(overrides: tuple[str, ...], seed: int, read_out: bool) -> dict[str, Any]:
    """Return what a federated run ends with: accuracies by name, and its wall time."""
    experiment = config.load([*overrides, *PLAIN, f"seed={seed}"])
    folder = Path(tempfile.mkdtemp())
    begin = time.perf_counter()
    try:
        path = folder / "run"
        summary = simulation.run_experiment(experiment, path).summary
        accuracies = summary.get("accuracy_by_width") or {"": summary["accuracy"]}
        if read_out:
            accuracies = {"float": summary["float_accuracy"], **post_training(path)}
    finally:
        shutil.rmtree(folder)
    return {"accuracies": accuracies, "seconds": time.perf_counter() - begin}


def post_training(path: Path) -> dict[str, float]:
    """Return the accuracies of a float run's model, by the ranges that its clients saw."""
    experiment, (tensors, _) = config.load_resumed(read_config(path), []), read_model(path)
    found = {}
    for name, weights in PTQ.items():
        given = source(experiment, tensors, fedq.build("quantization", "ptq", weights=weights))
        data = given.dataset
        right = given.logits(data.test_inputs()).argmax(1) == data.y_test
        found[name] = float(right.mean())
    return found


def rows_of(cells: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Return one row per scheme, and per width of mixed ones."""
    accuracies: dict[str, dict[int, float]] = {}
    for cell in cells:
        if cell["task"] == task:
            for part, accuracy in cell["accuracies"].items():
                name = part if part in ("float", *PTQ) else f"{cell['scheme']}: {part}"
                name = name.removesuffix(": ")
                accuracies.setdefault(name, {})[cell["seed"]] = 100 * accuracy
    reference = accuracies.get("float", {})
    rows = []
    for name, values in accuracies.items():
        rows.append(
            {
                "scheme": name,
                "accuracy": f"{statistics.mean(values.values()):.2f}",
                "difference": versus(values, reference),
                "goal": f"-{GOALS[name]}" if name in GOALS else None,
                "seeds": len(values),
            }
        )
    return rows


def main() -> None:
    """Run all cells and write the results."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--schemes", nargs="*", default=list(MAIN), choices=list(SCHEMES))
    options.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    options.add_argument("--words", help="folder of DIGIT_SPEAKER_N.wav, for keywords")
    options.add_argument("--again", action="store_true", help="drop what the results file holds")
    arguments = options.parse_args()
    seeds, schemes = range(arguments.seed, arguments.seed + arguments.seeds), arguments.schemes
    extra: tuple[str, ...] = ()
    if arguments.quick:
        seeds, extra = seeds[:1], ("rounds=1", "clients_per_round=2")
        schemes, arguments.tasks = ["float", "W8A8", "mixed 8, 4, 2"], ["images"]
    if "keywords" in arguments.tasks and arguments.words is None:
        options.error("keywords need --words FOLDER")
    settings = {task: " ".join((*TASKS[task], *extra)) for task in TASKS}
    cells = (
        [] if arguments.again else earlier_cells(arguments.out, "quantization", settings, "task")
    )
    done = {(cell["task"], cell["scheme"], cell["seed"]) for cell in cells}
    for seed in seeds:
        for task in arguments.tasks:
            for scheme in schemes:
                if (task, scheme, seed) in done:
                    continue
                words = (f"data.path={arguments.words}",) if task == "keywords" else ()
                overrides = (*TASKS[task], *words, *SCHEMES[scheme], *extra)
                cell = run(overrides, seed, read_out=scheme == "float")
                name = {"task": task, "scheme": scheme, "seed": seed, "settings": settings[task]}
                cells.append({**name, **cell, **when_and_where()})
                print(task, scheme, seed, cell["accuracies"], flush=True)
                report(arguments.out, cells, settings)


def report(out: Path, cells: list[dict[str, Any]], settings: dict[str, str]) -> None:
    """Write the results so far."""
    columns = {
        "scheme": "scheme",
        "accuracy": "accuracy, %",
        "difference": "minus float, points",
        "goal": "goal",
        "seeds": "seeds",
    }
    order = ["float", "W8A8", "W8A8 PTQ", "W4A8", "W4A8 PTQ", "W2A8 codebook", "W2A8 LSQ", "W2A8"]
    text = []
    for task in sorted({cell["task"] for cell in cells}):
        rows = rows_of(cells, task)
        rows.sort(key=lambda row: order.index(row["scheme"]) if row["scheme"] in order else 99)
        text += [f"## {task}", f"`{settings[task]}`", table(columns, rows)]
    write(out, "quantization", "Accuracy by quantization", text, {"cells": cells})


if __name__ == "__main__":
    main()
