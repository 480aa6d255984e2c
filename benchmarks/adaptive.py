"""Bit budgets that adapt, beside fixed ones at equal bytes.

Digits (8 x 8), 20 clients, 8 per round, Dirichlet(0.5), a small CNN, the dithered uniform codec
with an entropy coder. Fixed bits from 2 to 5, and three budgets: DAdaQuant and AdaQuantFL from 2
bits up, and bits by link from 3 on a third of the clients each on Wi-Fi, LTE-M and NB-IoT (all
methods run on that fleet, for the times).

The last column is the accuracy of an adaptive run at its end, minus the best that any of the fixed
ones reached within as many uplink bytes, paired by seed: above 0, adapting was worth it. The best
of four fixed widths is a choice in hindsight, which favours the fixed ones.
"""

from __future__ import annotations

import sys

import _common
import _runs

FEDERATION = (
    "data=digits",
    "clients=20",
    "clients_per_round=8",
    "baseline=false",
    "engine.workers=2",
    "fleet=mixture",
    "fleet.devices=[pi_4,pi_4,pi_4]",
    "fleet.links=[wifi,lte_m,nb_iot]",
)
ROUNDS = 40
ACCURACY = 0.90
FIXED = {f"{bits} bits": (f"codec.bits={bits}",) for bits in (2, 3, 4, 5)}
ADAPTIVE = {
    "DAdaQuant": ("codec.bits=2", "budget=dadaquant", "budget.max_bits=5"),
    "AdaQuantFL": ("codec.bits=2", "budget=adaquantfl", "budget.max_bits=5"),
    "by link": ("codec.bits=3", "budget=link_aware", "budget.max_bits=5"),
}


def main() -> None:
    options = _common.parser(__doc__).parse_args()
    rounds = 1 if options.quick else ROUNDS
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    runs = {}
    for name, chosen in {**FIXED, **ADAPTIVE}.items():
        runs[name] = [
            _runs.rounds([*FEDERATION, *chosen, f"rounds={rounds}", f"seed={seed}"])
            for seed in seeds
        ]
        print(name, figures(runs[name]), file=sys.stderr)
    rows = []
    for name in runs:
        row: dict[str, object] = {"budget": name, **figures(runs[name])}
        if name in ADAPTIVE:
            row["gain"] = [
                100 * gain(runs[name][i], [runs[fixed][i] for fixed in FIXED])
                for i in range(len(seeds))
            ]
        rows.append(row)
    _common.write(
        options.out,
        "adaptive",
        "Bit budgets that adapt",
        [
            *(__doc__ or "").split("\n\n")[1:],
            f"Means and ranges over seeds {seeds.start} to {seeds.stop - 1}.",
            _common.table(
                {
                    "budget": "budget",
                    "uplink": "uplink bytes",
                    "accuracy": "accuracy at the end",
                    "reached": f"uplink bytes to {ACCURACY:.0%}",
                    "seconds": f"simulated s to {ACCURACY:.0%}",
                    "gain": "points beyond fixed, equal bytes",
                },
                [
                    {k: _runs.spread(v) if isinstance(v, list) else v for k, v in row.items()}
                    for row in rows
                ],
            ),
        ],
        {"rounds": rounds, "target": ACCURACY, "budgets": rows},
    )


def figures(runs: list[list[dict[str, object]]]) -> dict[str, list[float | None]]:
    """Return the figures of one budget by seed."""
    return {
        "uplink": [_runs.total(lines, "uplink_bytes") for lines in runs],
        "accuracy": [end(lines) for lines in runs],
        "reached": [_runs.to_reach(lines, ACCURACY, "uplink_bytes") for lines in runs],
        "seconds": [_runs.to_reach(lines, ACCURACY, "simulated_seconds") for lines in runs],
    }


def end(lines: list[dict[str, object]]) -> float:
    """Return the best accuracy of the last five rounds."""
    return max(_runs.best_within(lines[-5:], float("inf"), "uplink_bytes"), 0.0)


def gain(run: list[dict[str, object]], fixed: list[list[dict[str, object]]]) -> float:
    """Return a run's accuracy minus the best of the fixed ones within as many uplink bytes."""
    spent = _runs.total(run, "uplink_bytes")
    return end(run) - max(_runs.best_within(lines, spent, "uplink_bytes") for lines in fixed)


if __name__ == "__main__":
    main()
