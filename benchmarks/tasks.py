"""What codecs do to accuracy: a federated CNN on MNIST-5k, in real bytes both ways.

50 clients by Dirichlet(0.3), 10 a round, 30 rounds, else the main job's training, in float and
through `fedq simulate`'s machinery. The model is `small_cnn(width=32)`, 220,234 parameters: a run
takes some 40 s of CPU. `accuracy` is the mean over the last five rounds; it and `to float`, the
difference to the float run of the same seed in points, are means over seeds with the deviation
between seeds. Bits are lengths of all payloads times 8 over parameters and
updates. `fewer` is how many times fewer bytes than float32 a run sends, both ways together.

Accuracy ranks codecs differently from NMSE: what is biased loses the same small coordinates in
every round. Every cell is a run directory below `--work`; finished ones are not run again, and
interrupted ones go on. Remove the directory when a codec's code has changed. A run whose updates
the server refuses three rounds in a row has diverged: below a certain rate the noise of an unbiased
code is many times the update.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import _common
import matplotlib.pyplot as plt

from fedq import config, registry, simulation
from fedq.errors import FedqError
from fedq.experiment import Experiment
from fedq.report.plots import COLOURS, FLOAT_COLOUR
from fedq.results import holds_run, read_rounds, read_summary
from fedq.server import summarise as summarise_run

WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedq" / "tasks"
TASK = (
    *("model=small_cnn", "model.width=32", "quantization=none", "baseline=false"),
    *("partition=dirichlet", "partition.alpha=0.3", "clients=50", "clients_per_round=10"),
    *("rounds=30", "codec=identity", "downlink=identity", "engine.workers=1"),
)
QUICK = ("model=mlp", "data=digits", "rounds=2", "clients=6", "clients_per_round=3")
BITS = (0.1, 0.05, 0.025, 0.0125)
LAST = 5
PARAMETERS = 220_234
DIVERGED = "diverged.txt"

Config = Mapping[str, Any]
FLOAT: Config = {"name": "identity"}
JOB = config.compose_config([])


def _feedback(inner: Config) -> Config:
    return {"name": "error_feedback", "inner": inner}


#: Uplink and downlink of every cell; those with codecs that are not registered are left out.
CELLS: list[tuple[Config, Config]] = [
    (FLOAT, FLOAT),
    (JOB["codec"], FLOAT),
    *(({"name": "low_rank", "bits": bits}, FLOAT) for bits in BITS),
    *(({"name": "dtcq", "bits": bits}, FLOAT) for bits in BITS),
    *(({"name": "eden", "bits": bits}, FLOAT) for bits in BITS),
    ({"name": "low_rank", "inner": "rdo_tcq", "bits": 0.1}, FLOAT),
    (_feedback({"name": "top_k", "fraction": 0.01}), FLOAT),
    (_feedback({"name": "sign"}), FLOAT),
    *(({"name": "low_rank", "bits": bits}, JOB["downlink"]) for bits in (0.2, 0.1)),
]


@dataclass(frozen=True)
class Cell:
    """One run: a codec each way and a seed."""

    uplink: Config
    downlink: Config
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Both codecs in one line."""
        up, down = (registry.describe(c, "codec") for c in (self.uplink, self.downlink))
        return up if self.downlink == FLOAT else f"{up}, downlink {down}"

    @property
    def unbiased(self) -> bool:
        """Whether the uplink is."""
        return bool(registry.from_config("codec", self.uplink).unbiased)

    def experiment(self) -> Experiment:
        """Return the experiment; ConfigError if a codec is not to be had."""
        return config.load(self.overrides).replace(
            seed=self.seed,
            codec=registry.from_config("codec", self.uplink),
            downlink=registry.from_config("codec", self.downlink),
        )

    def path(self, work: Path) -> Path:
        """Return the run directory: another one for other options."""
        what = [self.uplink, self.downlink, self.seed, self.overrides]
        settings = json.dumps(what, sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return work / f"{self.uplink['name']}-{digest}"

    def run(self, work: Path) -> dict[str, Any]:
        """Run the cell, go on with it or read what it left; return its figures."""
        path = self.path(work)
        experiment = self.experiment().replace(run_dir=str(path))
        try:
            if not (path / DIVERGED).exists():
                simulation.simulate(experiment, resume=holds_run(path))
        except FedqError as error:
            if "rounds in a row" not in str(error):
                raise
            (path / DIVERGED).write_text(str(error))
        rounds = read_rounds(path)
        summary = read_summary(path) or summarise_run(experiment, PARAMETERS, rounds)
        sent = summary["uplink_bytes"] + summary["downlink_bytes"]
        whole = summary["float32_uplink_bytes"] + summary["float32_downlink_bytes"]
        return {
            "diverged": summary["rounds"] < experiment.rounds,
            "codec": self.name,
            "curve": _curve(self.uplink),
            "unbiased": self.unbiased,
            "both_ways": self.downlink != FLOAT,
            "seed": self.seed,
            "accuracy": statistics.fmean(record["accuracy"] for record in rounds[-LAST:]),
            "uplink_bits": summary["uplink_bits_per_parameter"],
            "downlink_bits": summary["downlink_bits_per_parameter"],
            "fewer": whole / sent,
            "seconds": summary["seconds"],
            "rounds": summary["rounds"],
        }


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--codecs", nargs="+", help="uplinks by name; identity always runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--work", type=Path, default=WORK, help="where run directories are kept")
    options = parser.parse_args()
    task = TASK
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            task = (*(o for o in TASK if not o.startswith("model")), *QUICK)
            options.seeds, options.codecs, options.work = [0], ["sign"], Path(folder)
        left_out: list[str] = []
        cells = list(chosen(options.codecs, options.seeds, task, left_out))
        figures = run_all(cells, options.work, options.jobs)
    rows = list(summarise(figures))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, options.out / "tasks")
    text = [str(__doc__).strip(), "![Accuracy against uplink bits](tasks.svg)"]
    text += [f"Seeds {', '.join(map(str, options.seeds))}.", _common.table(COLUMNS, rows)]
    if left_out:
        text += [f"Left out: {'; '.join(dict.fromkeys(left_out))}."]
    found = {"seeds": options.seeds, "overrides": task, "rows": rows, "cells": figures}
    _common.write(options.out, "tasks", "Accuracy against real bytes", text, found)


def chosen(
    names: Sequence[str] | None, seeds: Sequence[int], task: tuple[str, ...], left_out: list[str]
) -> Iterator[Cell]:
    """Yield the cells to run, first of all codecs with the first seed."""
    for seed in seeds:
        for up, down in CELLS:
            if names is not None and up["name"] not in (*names, FLOAT["name"]):
                continue
            cell = Cell(up, down, seed, task)
            try:
                cell.experiment()
            except FedqError as error:
                left_out.append(str(error))
                continue
            yield cell


def run_all(cells: Sequence[Cell], work: Path, jobs: int) -> list[dict[str, Any]]:
    """Run the cells, some at a time, and return their figures in the cells' order."""
    figures: dict[int, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(cell.run, work): i for i, cell in enumerate(cells)}
        for future in as_completed(futures):
            found = figures[futures[future]] = future.result()
            print(
                f"{len(figures)}/{len(cells)} {found['codec']}, seed {found['seed']}: "
                f"{found['accuracy']:.4f} at {found['uplink_bits']:.4g} bits up, "
                f"{found['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return [figures[i] for i in sorted(figures)]


COLUMNS = {
    "codec": "codec",
    "unbiased": "unbiased",
    "uplink_bits": "uplink, bits/parameter",
    "downlink_bits": "downlink, bits/parameter",
    "fewer": "fewer",
    "accuracy_text": "accuracy, %",
    "to_float_text": "to float, points",
    "seconds": "seconds a run",
}


def summarise(figures: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row per codec, over its seeds."""
    whole = {f["seed"]: f["accuracy"] for f in figures if f["codec"] == FLOAT["name"]}
    for name in dict.fromkeys(f["codec"] for f in figures):
        own = [f for f in figures if f["codec"] == name]
        stable = [f for f in own if not f["diverged"]]
        accuracy = [100 * f["accuracy"] for f in stable]
        to_float = [100 * (f["accuracy"] - whole[f["seed"]]) for f in stable]
        lost = (
            f"; {len(own) - len(stable)} of {len(own)} diverged" if len(stable) < len(own) else ""
        )
        yield {
            "codec": name,
            "curve": own[0]["curve"],
            "unbiased": "yes" if own[0]["unbiased"] else "no",
            "both_ways": own[0]["both_ways"],
            **{
                key: statistics.fmean(f[key] for f in own)
                for key in ("uplink_bits", "downlink_bits", "fewer", "seconds")
            },
            "accuracy": statistics.fmean(accuracy) if stable else None,
            "accuracy_text": f"{_spread(accuracy, '')}{lost}" if stable else lost.lstrip("; "),
            "to_float": statistics.fmean(to_float) if stable else None,
            "to_float_text": _spread(to_float, "+") if stable else "",
        }


def _spread(values: Sequence[float], sign: str) -> str:
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _curve(codec: Config) -> str:
    """Return the names of a codec and its inner ones.

    >>> _curve({"name": "subset", "bits": 0.1, "inner": {"name": "eden"}})
    'subset + eden'
    """
    inner = codec.get("inner")
    inner = {"name": inner} if isinstance(inner, str) else inner
    return f"{codec['name']} + {_curve(inner)}" if inner else codec["name"]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against uplink bits, as ``path`` SVG and PNG."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    shown = [row for row in rows if not row["both_ways"] and row["accuracy"] is not None]
    shown.sort(key=lambda row: (row["curve"], row["uplink_bits"]))
    colours = 0
    for curve, found in groupby(shown, key=lambda row: row["curve"]):
        points = list(found)
        if curve == FLOAT["name"]:
            axes.axhline(points[0]["accuracy"], color=FLOAT_COLOUR, linewidth=1, label="float32")
            continue
        axes.plot(
            [row["uplink_bits"] for row in points],
            [row["accuracy"] for row in points],
            color=COLOURS[colours % len(COLOURS)],
            marker="os^Dv"[colours // len(COLOURS) % 5],
            fillstyle="full" if points[0]["unbiased"] == "yes" else "none",
            label=curve,
        )
        colours += 1
    axes.set(xscale="log", xlabel="uplink, real bits per parameter", ylabel="accuracy, %")
    ticks = [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title("Accuracy of the last five rounds; filled: unbiased, hollow: biased")
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.legend(frameon=False)
    for kind in ("svg", "png"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    main()
