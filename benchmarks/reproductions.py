"""The field's reference methods at equal work: bytes to 99 % of the float accuracy.

Every method of `conf/method` on every task of `conf/task`, by partitions and seeds: the cells of
`fedq simulate -m experiment=reproductions`, with smaller models so that a cell takes seconds, and
the report's figures. The same command goes on where it was stopped. The results file holds one
record per finished run; with `--keep` those of other days and machines count, too, and are not run
again.

Keywords come from a folder of recordings DIGIT_SPEAKER_N.wav, such as the Free Spoken Digit
Dataset's.

    python benchmarks/reproductions.py --work runs/reproductions --keywords FOLDER      # all
    python benchmarks/reproductions.py --keep --partitions dirichlet03 --seeds 1
    python benchmarks/reproductions.py --keep --tables --work runs/reproductions        # no runs
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import _common
from rich.console import Console

from fedq import config, progress, sweep
from fedq.manifest import fingerprint
from fedq.report import Run, Study, study_tables
from fedq.report.runs import survey
from fedq.report.study import remarks
from fedq.report.tables import size

WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedq" / "reproductions"
#: Overrides of each task: smaller models, so that a cell takes seconds of a quiet core.
TASKS = {
    "images": ("model=small_cnn", "model.width=8", "rounds=30"),
    "keywords": ("model=small_cnn", "rounds=60", "learning_rate_end=0.01"),
    "activity": (
        *("model=imu_cnn", "model.width=16", "rounds=50"),
        *("learning_rate=0.3", "learning_rate_end=0.03"),
    ),
}
QUICK = ("rounds=2", "data=digits", "clients=6", "clients_per_round=3", "local_epochs=1")
#: What a run fills in by itself, or no result depends on.
OF_A_RUN = ("clients", "decode_threads", "engine", "resume", "run_dir")
#: What a record keeps of a round, beside its number.
ROUND = ("uplink_bytes", "downlink_bytes")

Record = dict[str, Any]


# --- records -------------------------------------------------------------------------------------


def key(record: Record) -> tuple[Any, ...]:
    """Return which cell a record is of."""
    return tuple(record[name] for name in ("partition", "seed", "task", "method"))


def digest(settings: dict[str, Any]) -> str:
    """Return what tells one cell's options from another's, wherever its data lie and it runs."""
    data = {**settings["data"]}
    if "path" in data:
        data["path"] = Path(data["path"]).name
    kept = {name: value for name, value in settings.items() if name not in OF_A_RUN}
    return fingerprint({**kept, "data": data})[:16]


def to_record(run: Run) -> Record:
    """Return what the tables need of a run, in a few lines of text."""
    chosen = dict(text.split("=", 1) for text in run.manifest["overrides"])
    names = ("name", "data", "partition", "codec", "downlink", "rounds", "seed")
    settings = {name: run.config[name] for name in names}
    if "path" in settings["data"]:
        settings["data"] = {**settings["data"], "path": Path(settings["data"]["path"]).name}
    columns = ("round", run.metric.name, *ROUND)
    return {
        **{name: chosen[name] for name in ("task", "partition", "method")},
        "seed": run.seed,
        "options": digest(dict(run.config)),
        "config": settings,
        "rounds": {
            name: " ".join(f"{record.get(name) or 0:.5g}" for record in run.rounds)
            if name == run.metric.name
            else " ".join(str(record.get(name) or 0) for record in run.rounds)
            for name in columns
        },
        "summary": {
            run.metric.float_name: run.float_score,
            "weight_bytes": run.summary.get("weight_bytes"),
            "versions": {"fedq": (run.summary.get("versions") or {}).get("fedq")},
        },
    }


def to_run(record: Record) -> Run:
    """Return the run that a record tells of."""
    names = list(record["rounds"])
    rows = zip(*(map(float, text.split()) for text in record["rounds"].values()), strict=True)
    rounds = [dict(zip(names, row, strict=True)) for row in rows]
    return Run(Path(*map(str, key(record))), record["config"], rounds, record["summary"])


def read(out: Path) -> list[Record]:
    """Return the records of a results file, none if there is no file or it has none."""
    path = out / "reproductions.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return list(found.get("cells", []))


# --- cells ---------------------------------------------------------------------------------------


def requests(chosen: Any, tasks: Sequence[str], extra: Sequence[str]) -> Iterable[list[str]]:
    """Yield the overrides of each cell, a whole table after the other: partition, then seed."""
    seeds = range(chosen.seed, chosen.seed + chosen.seeds)
    methods = config.choices("method") if chosen.methods == "all" else chosen.methods.split(",")
    parts = chosen.partitions.split(",")
    for partition, seed, task, method in itertools.product(parts, seeds, tasks, methods):
        path = [f"data.path={chosen.keywords.resolve()}"] if task == "keywords" else []
        yield [
            *("experiment=reproductions", f"task={task}", f"partition={partition}"),
            *(f"method={method}", f"seed={seed}", *TASKS[task], *path, *extra),
        ]


def wanted(asked: Iterable[list[str]], kept: list[Record]) -> tuple[list[list[str]], list[Record]]:
    """Return the cells to run, and the records that do not contradict what is asked for."""
    known = {key(record): record for record in kept}
    todo = []
    for request in asked:
        text = dict(text.split("=", 1) for text in request)
        cell = (text["partition"], int(text["seed"]), text["task"], text["method"])
        if cell in known and known[cell]["options"] == digest(config.load(request).to_config()):
            continue
        known.pop(cell, None)
        todo.append(request)
    return todo, list(known.values())


def main() -> int:
    options = _common.parser(__doc__)
    options.add_argument("--work", type=Path, default=WORK, help="directory of the runs")
    options.add_argument("--keep", action="store_true", help="go on from the results file")
    options.add_argument("--keywords", type=Path, help="folder of DIGIT_SPEAKER_N.wav")
    options.add_argument("--tasks", default=",".join(TASKS))
    options.add_argument("--partitions", default="dirichlet03,iid")
    options.add_argument("--methods", default="all")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--jobs", type=int, help="runs at a time (default: as cores allow)")
    options.add_argument("--tables", action="store_true", help="only tables, of runs that ended")
    chosen = options.parse_args()
    tasks = chosen.tasks.split(",")
    extra: tuple[str, ...] = ()
    if chosen.quick:
        tasks, extra = ["images"], QUICK
        chosen.partitions, chosen.methods, chosen.seeds = "iid", "fedavg,fedq", 2
        chosen.work = chosen.out / "runs"
    elif "keywords" in tasks and chosen.keywords is None and not chosen.tables:
        tasks.remove("keywords")
        print("no --keywords FOLDER: that task is left out", file=sys.stderr)
    kept = read(chosen.out) if chosen.keep else []
    failed = []
    if not chosen.tables:
        todo, kept = wanted(requests(chosen, tasks, extra), kept)
        chosen.work.mkdir(parents=True, exist_ok=True)
        cells = sweep.plan(chosen.work, todo)
        with progress.cells(Console(stderr=True), len(cells)) as display:
            try:
                ended = sweep.run(chosen.work, cells, display, jobs=chosen.jobs)
            except KeyboardInterrupt:
                return 130
        failed = [end for end in ended if end.error]
    cells = {key(record): record for record in kept}
    if chosen.work.is_dir() and any(sweep.manifests(chosen.work)):
        runs = [run for run in survey([chosen.work]).runs if run.finished]
        cells |= {key(record): record for record in map(to_record, runs)}
    if not cells:
        print("no run has ended", file=sys.stderr)
        return 1
    write(chosen.out, [cells[each] for each in sorted(cells)])
    for end in failed:
        print(f"{end.cell.path}: {end.error}", file=sys.stderr)
    return 1 if failed else 0


# --- tables --------------------------------------------------------------------------------------


def write(out: Path, cells: list[Record]) -> None:
    """Write the results."""
    runs = [to_run(record) for record in cells]
    study = Study.of(runs)
    rounds = sorted({run.planned for run in runs})
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    _common.write(
        out,
        "reproductions",
        "Reference methods at equal work",
        [
            f"{len(cells)} runs, seeds {', '.join(map(str, seeds))}. {protocol()} All methods of a "
            "task have the same, and nothing was tuned for any. The float run of the same task, "
            "partition and seed sets the level. Methods of this project and FP8 are judged by "
            "their deployed quantized model, the others by their float one. Most reference methods "
            "leave the downlink in float32, as published: `uplink to there` compares the uplink "
            "alone.",
            "Bytes of both directions until 99 % of the float accuracy, and how many times fewer "
            "than float there (mean over seeds; `2 of 3`: so many seeds got there):",
            headline(study),
            "All figures:",
            study_tables.to_markdown(study),
            *remarks(runs),
        ],
        {
            "rounds": rounds,
            "seeds": seeds,
            "methods": [study_tables.record(study, method) for method in study.methods],
            "cells": cells,
        },
    )


def protocol() -> str:
    """Return how the tasks are trained, in words."""
    found = []
    for task, overrides in TASKS.items():
        plain = config.load([f"task={task}", *overrides])
        rate = f"learning rate {plain.learning_rate:g}"
        if plain.learning_rate_end != 1:
            rate += f", falling linearly to {plain.learning_rate * plain.learning_rate_end:g}"
        found.append(
            f"{task}: {plain.rounds} rounds of {plain.clients_per_round} clients, "
            f"{plain.local_epochs} local epochs, {rate}"
        )
    return "; ".join(found).capitalize() + "."


def headline(study: Study) -> str:
    """Return a table of methods by tasks, those that need the fewest bytes first."""
    rows: dict[str, dict[str, str]] = {}
    needed: dict[str, float] = {}
    for method in study.methods:
        reached = study.to_reach(method)
        text = f"{reached.reached} of {reached.of}"
        if reached.ratio is not None and reached.spent is not None:
            text = f"{size(reached.spent.mean)}, {reached.ratio:.3g}x"
        rows.setdefault(method.label, {"method": method.label})[method.task] = text
        cost = 1 / reached.ratio if reached.ratio else 1e9 - reached.reached
        needed[method.label] = needed.get(method.label, 0.0) + cost
    ordered = sorted(rows, key=lambda label: needed[label])
    columns = {"method": "method"} | {task: task for task in study.tasks}
    return _common.table(columns, [rows[label] for label in ordered])


if __name__ == "__main__":
    sys.exit(main())
