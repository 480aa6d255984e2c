"""Bits per layer: sensitivity and knapsack beside an evolutionary search, under three budgets.

    python benchmarks/allocation.py            # three seeds; a few minutes of one core
    python benchmarks/allocation.py --quick

Each seed trains one federation; both methods choose widths of its model's layers within the same
budget, without training again. The knapsack evaluates every layer at every width once, the search
as often as it has trials within the budget.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from _common import parser, table, write

from fedq import config, simulation
from fedq.allocate import allocate

RUN = (
    *("data=digits", "model=mlp", "model.hidden=[64,32,16]", "clients=20", "rounds=20"),
    *("baseline=false", "engine.workers=1", "evaluate_every=1000", "batch_size=10"),
)
BUDGETS = tuple((cost, bits) for cost in ("size", "energy", "latency") for bits in (2.5, 3.5))
TRIALS = 150
COLUMNS = {
    "budget": "budget",
    "knapsack_loss": "added loss, knapsack",
    "search_loss": "search",
    "uniform_loss": "uniform",
    "knapsack_accuracy": "accuracy, %, knapsack",
    "search_accuracy": "search",
    "uniform_accuracy": "uniform",
}


def measure(path: Path, cost: str, bits: float, trials: int, seed: int) -> dict[str, Any]:
    """Return what both methods find, and the widest uniform width within the budget."""
    found = allocate(path, cost=cost, bits=bits, search=trials, seed=seed)
    by_kind = {point["kind"]: point for point in found.measured}
    uniform = max(
        (p for p in found.measured if p["kind"] == "uniform" and p["cost"] <= found.budget),
        key=lambda point: point["cost"],
    )
    return {
        "cost": cost,
        "bits": bits,
        "seed": seed,
        "knapsack_loss": found.joint["knapsack"],
        "search_loss": found.joint["search"],
        "uniform_loss": uniform["loss"],
        "knapsack_accuracy": 100 * by_kind["knapsack"]["accuracy"],
        "search_accuracy": 100 * by_kind["search"]["accuracy"],
        "uniform_accuracy": 100 * uniform["accuracy"],
        "chosen": list(found.chosen.bits),
    }


def main() -> None:
    """Run all seeds and write the results."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    arguments = options.parse_args()
    seeds, budgets, trials = (
        range(arguments.seed, arguments.seed + arguments.seeds),
        BUDGETS,
        TRIALS,
    )
    extra: tuple[str, ...] = ()
    if arguments.quick:
        seeds, budgets, trials, extra = range(1), BUDGETS[:1], 5, ("rounds=1", "clients=10")
    cells = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            simulation.run_experiment(config.load([*RUN, *extra, f"seed={seed}"]), path)
            for cost, bits in budgets:
                cells.append(measure(path, cost, bits, trials, seed))
                print(cells[-1], flush=True)
    rows = []
    for cost, bits in budgets:
        mine = [cell for cell in cells if (cell["cost"], cell["bits"]) == (cost, bits)]
        means = {k: statistics.mean(cell[k] for cell in mine) for k in COLUMNS if k != "budget"}
        better = sum(cell["search_loss"] < cell["knapsack_loss"] for cell in mine)
        digits = {k: f"{v:.3f}" if "loss" in k else f"{v:.1f}" for k, v in means.items()}
        rows.append({"budget": f"{cost} of {bits} bits", **digits, "better": f"{better}"})
    columns = {**COLUMNS, "better": "seeds in which the search finds less"}
    text = [
        "scikit-learn's digits, an MLP of 64, 32 and 16 hidden units after 20 rounds of the default"
        " federation, weights `linear range=mse`, activations in float. Added loss is that of all"
        " layers together on 1,000 training examples (of `uniform`: the sum of the layers'), mean"
        f" over {len(seeds)} seeds. The knapsack takes 24 evaluations, the search up to {trials}.",
        table(columns, rows),
    ]
    write(arguments.out, "allocation", "Bits per layer under a budget", text, {"cells": cells})


if __name__ == "__main__":
    main()
