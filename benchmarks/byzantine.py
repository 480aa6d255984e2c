"""Accuracy of a federation under attack: attacks down, aggregation rules across.

15 clients, all in every round, 3 of them hostile; digits (8 x 8), Dirichlet(1), a float MLP, the
default codecs of the main job (5-bit dithered up, 8 rounds). Each cell is the test accuracy after
the last round, one seed. Rules know f = 3; attacks are not tuned to the rule. The guard has its
defaults but in the first column, where its limits and its quarantine are off; decoders check
scales and codes in every column.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import _common

from fedq import config, simulation
from fedq.errors import FedqError

FEDERATION = (
    "data=digits",
    "model=mlp",
    "quantization=none",
    "clients=15",
    "clients_per_round=15",
    "partition.alpha=1.0",
    "baseline=false",
    "engine.workers=1",
)
ATTACKS: dict[str, tuple[str, ...]] = {
    "none": (),
    "label flip": ("attack=label_flip",),
    "sign flip x3": ("attack=sign_flip", "attack.scale=3.0"),
    "ALIE z=1.5": ("attack=alie",),
    "ALIE z=10": ("attack=alie", "attack.z=10.0"),
    "IPM 10": ("attack=ipm", "attack.epsilon=10.0"),
    "min-max": ("attack=min_max",),
    "mimic": ("attack=mimic",),
    "scaling x10": ("attack=scaling",),
    "scale inflation x1000": ("attack=scale_inflation",),
    "scales NaN, Inf, ...": ("attack=bad_scale",),
}
UNGUARDED = ("guard.norm_limit=null", "guard.peak_limit=null", "guard.strikes=0")
RULES: dict[str, tuple[str, ...]] = {
    "mean, no guard": UNGUARDED,
    "mean": (),
    "mean, clip 2": ("guard.norm_clip=2.0",),
    "median": ("aggregator=median",),
    "Multi-Krum": ("aggregator=multi_krum", "aggregator.f=3"),
    "geometric median": ("aggregator=geometric_median",),
    "NNM + trimmed mean": (
        "aggregator=nearest_neighbour_mixing",
        "aggregator.f=3",
        "aggregator.inner=trimmed_mean",
        "aggregator.inner.trim=0.2",
    ),
}


def main() -> None:
    parser = _common.parser(__doc__)
    options = parser.parse_args()
    attacks = ["none", "sign flip x3"] if options.quick else list(ATTACKS)
    rules = ["mean", "median"] if options.quick else list(RULES)
    rounds = 1 if options.quick else 8
    rows = []
    start = time.process_time()
    for attack in attacks:
        row: dict[str, float | str] = {"attack": attack}
        for rule in rules:
            hostile = (*ATTACKS[attack], "attack.fraction=0.2") if ATTACKS[attack] else ()
            row[rule] = accuracy(
                [*FEDERATION, f"rounds={rounds}", f"seed={options.seed}", *hostile, *RULES[rule]]
            )
        rows.append(row)
        print(row, file=sys.stderr)
    columns = {"attack": "attack", **{rule: rule for rule in rules}}
    _common.write(
        options.out,
        "byzantine",
        "Federations under attack",
        [str(__doc__).strip(), _common.table(columns, rows)],
        {
            "seed": options.seed,
            "rounds": rounds,
            "cpu_seconds": time.process_time() - start,
            "rows": rows,
        },
    )


def accuracy(overrides: list[str]) -> float | str:
    """Return the accuracy of one run, or that it failed."""
    experiment = config.load(overrides)
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = simulation.run_experiment(experiment, Path(folder) / "run")
        except FedqError as error:
            print(error, file=sys.stderr)
            return "stops"
    return float(outcome.summary["accuracy"])


if __name__ == "__main__":
    main()
