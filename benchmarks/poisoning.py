"""Attack x aggregation rule x codec, over seeds; and a backdoor that quantization wakes up.

The grid: 15 clients, all in every round, 3 of them hostile; digits (8 x 8), Dirichlet(1), an int8
MLP, 8 rounds. Accuracy and backdoor success are of the deployed model after the last round, means
over seeds. Rules know f = 3. `adaptive` tunes the inner attack's strength in every round on the
attackers' own simulation of decoder, guard and rule. The guard has its defaults everywhere.

The backdoor: the main job's int8 CNN on MNIST (5,000 images), 15 rounds, whose float weights are
then poisoned within their rounding cells of 4 bits (the evaluation `quantization_backdoor`): what
the trigger does in float, at 8 and at 4 bits, with other rounding, and what a search for it finds.

Finished cells are kept in the folder `--cells`, so that a run that was killed goes on there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import _common

from fedq import build, config, simulation
from fedq.report import heatmap
from fedq.report.runs import Run
from fedq.robustness.base import Work
from fedq.robustness.subject import Subject

FEDERATION = (
    "data=digits",
    "model=mlp",
    "clients=15",
    "clients_per_round=15",
    "partition.alpha=1.0",
    "baseline=false",
    "engine.workers=1",
)
ATTACKS: tuple[tuple[str, ...], ...] = (
    (),
    ("attack=sign_flip", "attack.scale=3.0"),
    ("attack=alie",),
    ("attack=adaptive", "attack.inner=alie"),
    ("attack=adaptive", "attack.inner=min_max"),
    ("attack=dither_abuse",),
    ("attack=scale_inflation",),
    ("attack=overclaim",),
    ("attack=model_replacement",),
    ("attack=adaptive", "attack.inner=model_replacement"),
    ("attack=distributed_trigger",),
    ("attack=edge_case",),
)
RULES: tuple[tuple[str, ...], ...] = (
    ("aggregator=mean",),
    ("aggregator=median",),
    ("aggregator=multi_krum", "aggregator.f=3"),
    ("aggregator=geometric_median",),
    (
        "aggregator=nearest_neighbour_mixing",
        "aggregator.f=3",
        "aggregator.inner=trimmed_mean",
        "aggregator.inner.trim=0.2",
    ),
)
CODECS: tuple[tuple[str, ...], ...] = (
    ("codec=identity",),
    ("codec=dithered",),
    ("codec=sign",),
)
SEEDS = 3


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--cells", type=Path, help="folder of finished cells; temporary if absent")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cells = options.cells or Path(temporary)
        cells.mkdir(parents=True, exist_ok=True)
        grid, seconds = attacked(cells, options.seed, options.quick)
        seeds = range(options.seed, options.seed + (1 if options.quick else SEEDS))
        woken = [conditioned(cells, seed, options.quick) for seed in seeds]
    if not options.quick:
        figure = heatmap.plot(grid)
        options.out.mkdir(parents=True, exist_ok=True)
        heatmap.save(figure, options.out / "poisoning.png")
        heatmap.save(figure, options.out / "poisoning.svg")
    _common.write(
        options.out,
        "poisoning",
        "Poisoning, backdoors and what stands against them",
        [
            str(__doc__).strip(),
            "![heat map](poisoning.svg)",
            heatmap.to_markdown(grid).strip(),
            "**A backdoor that quantization wakes up**, mean of seeds",
            _common.table({"what": "model", "accuracy": "accuracy, %", "success": "success, %"},
                          means([cell["models"] for cell in woken])),
            _common.table({"what": "search for a trigger in", "found": "answers that differ, %"},
                          means([cell["searches"] for cell in woken])),
        ],
        {
            "seed": options.seed,
            "cpu_seconds": seconds,
            "conditioned": woken,
            "rows": [
                {"attack": attack, "aggregator": rule, "codec": codec, "metric": metric,
                 "values": grid.values(metric, attack, rule, codec)}
                for metric in grid.metrics
                for codec in grid.codecs
                for attack in grid.rows(metric)
                for rule in grid.aggregators
            ],
        },
    )  # fmt: skip


def attacked(cells: Path, seed: int, quick: bool) -> tuple[heatmap.AttackGrid, float]:
    """Return the grid of all federations, and the CPU time that they took."""
    attacks = (ATTACKS[0], ATTACKS[1], ATTACKS[8]) if quick else ATTACKS
    rules, codecs = (RULES[:2], CODECS[1:2]) if quick else (RULES, CODECS)
    rounds, seeds = (1, 1) if quick else (8, SEEDS)
    runs, spent = [], 0.0
    total = len(attacks) * len(rules) * len(codecs) * seeds
    for number in range(seed, seed + seeds):
        schedule = (f"rounds={rounds}", f"seed={number}")
        for codec in codecs:
            for attack in attacks:
                for rule in rules:
                    hostile = (*attack, "attack.fraction=0.2") if attack else ()
                    cell = federation(
                        cells,
                        [*FEDERATION, *schedule, *codec, *hostile, *rule],
                    )
                    spent += cell["cpu_seconds"]
                    runs.append(Run(Path(f"{len(runs)}"), cell["config"], (), cell["summary"]))
                    print(f"{len(runs)} of {total}: {cell['summary']['accuracy']:.3f}",
                          *codec, *attack, *rule, file=sys.stderr)  # fmt: skip
    grid = heatmap.AttackGrid.of(runs)
    assert grid is not None
    return grid, spent


def federation(cells: Path, overrides: list[str]) -> dict[str, Any]:
    """Return configuration, summary and CPU time of one run."""
    experiment = config.load(overrides)
    settings = experiment.to_config()
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    kept = cells / f"{name}.json"
    if not kept.exists():
        start = cpu_seconds()
        with tempfile.TemporaryDirectory() as folder:
            summary = simulation.run_experiment(experiment, Path(folder) / "run").summary
        seconds = cpu_seconds() - start
        cell = {"config": settings, "summary": summary, "cpu_seconds": seconds}
        kept.with_suffix(".tmp").write_text(json.dumps(cell))
        kept.with_suffix(".tmp").replace(kept)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def conditioned(cells: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Return accuracy and success by model, and what the search finds by model, in [0, 1]."""
    kept = cells / f"conditioned-{seed}{'-quick' if quick else ''}.json"
    if not kept.exists():
        task = ["data=digits", "model=mlp", "rounds=1"] if quick else []
        overrides = [*task, f"seed={seed}", "baseline=false", "engine.workers=1"]
        less: dict[str, Any] = {"rows": 300, "steps": 5, "restarts": 1} if quick else {}
        evaluation = build("evaluation", "quantization_backdoor", **less)
        start = cpu_seconds()
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            simulation.run_experiment(config.load(overrides), run)
            found = evaluation.run(Subject.load(run), Work(seed, Path(folder)))
        named = {outcome.name: outcome for outcome in found}
        planted = named["planted at int4, nearest rounding"].details
        models = {"float": planted["float"], "int8": planted["int8"], "int4": planted["int4"]}
        for rounding in ("random rounding", "adaptive rounding"):
            outcome = named[f"planted at int4, {rounding}"]
            accuracy = outcome.details["accuracy"]
            models[f"int4, {rounding}"] = {"accuracy": accuracy, "success": outcome.value}
        searches = {
            name.removeprefix("hidden behaviour, "): {"found": outcome.value}
            for name, outcome in named.items()
            if name.startswith("hidden")
        }
        searches["the planted one at int4"] = {"found": planted["found by the search"]}
        cell = {
            "seed": seed,
            "models": [{"what": name, **figures} for name, figures in models.items()],
            "searches": [{"what": name, **figures} for name, figures in searches.items()],
            "cpu_seconds": cpu_seconds() - start,
        }
        kept.write_text(json.dumps(cell))
    found_before: dict[str, Any] = json.loads(kept.read_text())
    return found_before


def means(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the mean of like tables of shares, in percent."""
    return [
        {
            key: first[key]
            if isinstance(first[key], str)
            else round(100 * sum(row[key] for row in rows) / len(rows), 1)
            for key in first
        }
        for rows in zip(*tables, strict=True)
        for first in rows[:1]
    ]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
