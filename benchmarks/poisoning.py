"""Attack x aggregation rule x codec, over seeds; and a backdoor that quantization wakes up.

The grid: 15 clients, all in every round, 3 of them hostile; digits (8 x 8), Dirichlet(1), an int8
MLP, 8 rounds. Accuracy and backdoor success are of the deployed model after the last round, means
over seeds. Rules know f = 3. `adaptive` tunes the inner attack's strength in every round on the
attackers' own simulation of decoder, guard and rule. The guard has its defaults everywhere.

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

from fedq import config, simulation
from fedq.report import heatmap
from fedq.report.runs import Run

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
    if not options.quick:
        figure = heatmap.plot(grid)
        options.out.mkdir(parents=True, exist_ok=True)
        heatmap.save(figure, options.out / "poisoning.png")
        heatmap.save(figure, options.out / "poisoning.svg")
    _common.write(
        options.out,
        "poisoning",
        "Poisoning, backdoors and what stands against them",
        [str(__doc__).strip(), "![heat map](poisoning.svg)", heatmap.to_markdown(grid).strip()],
        {
            "seed": options.seed,
            "cpu_seconds": seconds,
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


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
