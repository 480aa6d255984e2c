"""Pruning, factors, distillation and read-outs: what each does to accuracy, bytes and size.

    python benchmarks/compression.py            # three seeds; five minutes of one core
    python benchmarks/compression.py --keep     # only cells that the results do not hold yet
    python benchmarks/compression.py --quick

Every cell is a whole federated run by the main job's path, judged on the test set as deployed.
Differences are paired by seed to the first row of a table: the same partition, cohorts and initial
weights. Intervals are 95 % by Student's t over seeds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from _common import parser, table, versus, write

from fedq import config, simulation
from fedq.errors import FedqError
from fedq.results import read_config

PLAIN = ("baseline=false", "engine.workers=1", "evaluate_every=1000", "batch_size=10")
HIDDEN = "hidden=[64,32]"
DIGITS = ("data=digits", "model=mlp", f"model.{HIDDEN}", "clients=20", "rounds=20")
MAGNITUDE = ("pruning=magnitude", "pruning.end=12")
CHANNEL = (*MAGNITUDE, "pruning.unit=channel")
LOW_RANK = ("model=low_rank", "model.inner=mlp", f"model.inner.{HIDDEN}", "model.share=0.25")
MIXED = ("quantization=mixed", "quantization.first_last=null")
#: By table: overrides by row; the first row is what the others are compared with.
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "Fewer weights": {
        "dense": (),
        "weights, 80 %": MAGNITUDE,
        "channels, 50 %": (*CHANNEL, "pruning.sparsity=0.5"),
        "quantizer `pruned`, 80 %": ("quantization=pruned8", "quantization.weights.sparsity=0.8"),
        "low rank, share 0.25": LOW_RANK,
    },
    "Server distillation": {
        "mean": ("partition.alpha=0.1",),
        "FedDF": ("partition.alpha=0.1", "server_distillation=feddf"),
    },
    "Read-out of a federation of 8, 4 and 2 bits": {
        "calibrated": (*MIXED, "read_out=calibrated"),
        "distilled": (*MIXED, "read_out=distilled"),
    },
}
READ_OUT = "Read-out of a federation of 8, 4 and 2 bits"
COLUMNS = {
    "row": "run",
    "accuracy": "accuracy, %",
    "difference": "difference, points",
    "seeds": "seeds",
    "sparsity": "zeros",
    "uplink_kb": "up, kB",
    "downlink_kb": "down, kB",
    "weight_kb": "weights, kB",
    "file_kb": "file, kB",
    "latency_us": "latency, µs",
}


def run(overrides: tuple[str, ...], seed: int, export: bool) -> dict[str, Any]:
    """Return what of a run's summary the tables show, and of its LiteRT file if asked."""
    with tempfile.TemporaryDirectory() as folder:
        base = DIGITS
        if any(override.startswith("model=") for override in overrides):
            base = tuple(override for override in DIGITS if not override.startswith("model"))
        experiment = config.load([*PLAIN, *base, *overrides, f"seed={seed}"])
        summary = simulation.run_experiment(experiment, Path(folder) / "run").summary
        cell = {key: summary.get(key) for key in KEYS}
        if export:
            cell |= exported(Path(folder) / "run")
    return cell


KEYS = (
    *("accuracy", "float_accuracy", "accuracy_by_width", "accuracy_read_out", "sparsity"),
    *("removed_channels", "parameters", "weight_bytes", "uplink_bytes", "downlink_bytes"),
)


def exported(path: Path) -> dict[str, Any]:
    """Return size and latency of a run's model in LiteRT; nothing where that is not installed."""
    import fedq
    from fedq.export._release import release
    from fedq.export._source import source
    from fedq.results import read_model

    experiment = config.load_resumed(read_config(path), [])
    tensors, _ = read_model(path)
    try:
        released = release(
            source(experiment, tensors, experiment.quantization),
            fedq.build("exporter", "litert"),
            path / "export",
        )
    except FedqError as error:
        return {"not_exported": str(error)}
    return {key: released.report[key] for key in ("bytes", "latency_us")}


def mean_of(cells: list[dict[str, Any]], key: str, unit: float) -> float | None:
    """Return the mean of a figure in a unit; None where no cell has it."""
    values = [cell[key] / unit for cell in cells if cell.get(key) is not None]
    return round(statistics.mean(values), 1) if values else None


def rows_of(cells: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    by_row: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["table"] == title:
            by_row.setdefault(cell["row"], []).append(cell)
    reference = {cell["seed"]: 100 * cell["accuracy"] for cell in next(iter(by_row.values()))}
    rows = []
    for name, of in by_row.items():
        values = {cell["seed"]: 100 * cell["accuracy"] for cell in of}
        zeros = mean_of(of, "sparsity", 0.01)
        rows.append(
            {
                "row": name,
                "accuracy": f"{statistics.mean(values.values()):.2f}",
                "difference": versus(values, reference),
                "seeds": len(of),
                "sparsity": None if zeros is None else f"{zeros:.0f} %",
                "uplink_kb": mean_of(of, "uplink_bytes", 1e3),
                "downlink_kb": mean_of(of, "downlink_bytes", 1e3),
                "weight_kb": mean_of(of, "weight_bytes", 1e3),
                "file_kb": mean_of(of, "bytes", 1e3),
                "latency_us": mean_of(of, "latency_us", 1),
            }
        )
    return rows


def read_outs(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the read-outs: per width as trained, and what each read-out adds."""
    of = [cell for cell in cells if cell["table"] == READ_OUT]
    rows = []
    for width in of[0]["accuracy_by_width"]:
        plain = [c["accuracy_by_width"][width] for c in of if c["row"] == of[0]["row"]]
        row = {"row": width, "as trained": f"{100 * statistics.mean(plain):.2f}"}
        for name in dict.fromkeys(cell["row"] for cell in of):
            mine = [cell for cell in of if cell["row"] == name]
            served = {cell["seed"]: 100 * cell["accuracy_read_out"][width] for cell in mine}
            before = {cell["seed"]: 100 * cell["accuracy_by_width"][width] for cell in mine}
            row[name] = f"{statistics.mean(served.values()):.2f}"
            row[f"{name}, gain"] = versus(served, before)
        rows.append(row)
    return rows


def main() -> None:
    """Run all cells and write the results."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--keep", action="store_true", help="go on from the results file")
    options.add_argument("--tables", nargs="*", default=list(TABLES), choices=list(TABLES))
    arguments = options.parse_args()
    seeds, extra = range(arguments.seed, arguments.seed + arguments.seeds), ()
    if arguments.quick:
        seeds, extra = range(1), ("rounds=2", "clients=4", "clients_per_round=4")
    cells: list[dict[str, Any]] = []
    if arguments.keep:
        cells = json.loads((arguments.out / "compression.json").read_text())["cells"]
    done = {(cell["table"], cell["row"], cell["seed"]) for cell in cells}
    for title in arguments.tables:
        rows = list(TABLES[title].items())
        for name, overrides in rows[-1:] if arguments.quick else rows:
            for seed in seeds:
                if (title, name, seed) in done:
                    continue
                export = title == "Fewer weights" and seed == 0 and not arguments.quick
                figures = run((*overrides, *extra), seed, export)
                cells.append({"table": title, "row": name, "seed": seed, **figures})
                print(title, name, seed, figures["accuracy"], flush=True)
    text = [
        "scikit-learn's digits, an MLP of 64 and 32 hidden units, 20 clients by Dirichlet 0.5 (0.1"
        " for server distillation), 10 a round, 20 rounds, default codec and downlink, int8. Bytes"
        " are those of all rounds and clients;"
        " weights are those on the device, packed; file and latency are LiteRT's int8, seed 0."
    ]
    for title in TABLES:
        if any(cell["table"] == title for cell in cells):
            rows_ = read_outs(cells) if title == READ_OUT else rows_of(cells, title)
            columns = dict.fromkeys(rows_[0]) if title == READ_OUT else COLUMNS
            columns = {key: COLUMNS.get(key) or key for key in columns}
            used = {k: v for k, v in columns.items() if any(r.get(k) is not None for r in rows_)}
            text += [f"## {title}", table(used, rows_)]
    write(arguments.out, "compression", "Compression beside quantization", text, {"cells": cells})


if __name__ == "__main__":
    main()
