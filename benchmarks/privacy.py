"""What privacy costs: accuracy at equal epsilon, and the time to encode a million parameters.

Accuracy: digits over 200 clients of 7 rows, half of them in a round, a small perceptron; central
Gaussian noise on float updates beside the same with a dithered code, and beside the mechanisms on
integers. Integers are accounted in RDP, which asks for more noise at the same epsilon than the
Gaussian's exact curve; one row has the Gaussian with as much noise as Skellam has.

Encoding: one client's CPU time for clip, rotation, rounding and noise, beside NumPy's
(insecure, floating-point) Gaussian noise.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
import numpy as np

from fedq import build, config, simulation
from fedq.privacy._entropy import Entropy
from fedq.privacy.base import Round
from fedq.privacy.gaussian import noisy_sum

DELTA = 1e-4
SEEDS = 6
EPSILONS = (1.0, 3.0, 10.0)
PARAMETERS = 1_000_000
FEDERATION = (
    *("data=digits", "model=mlp", "model.hidden=[16]", "partition=iid", "quantization=none"),
    *("clients=200", "clients_per_round=100", "local_epochs=3", "learning_rate=0.5", "quorum=1.0"),
    *("codec=identity", "downlink=identity", "baseline=false", "engine.workers=1"),
)
MECHANISMS: dict[str, tuple[str, ...]] = {
    "Gaussian, float updates": ("privacy=gaussian",),
    "Gaussian, dithered code": ("privacy=gaussian", "codec=dithered"),
    "Skellam, 16 bits": ("privacy=skellam",),
    "Poisson-binomial, 16 levels": ("privacy=poisson_binomial", "privacy.levels=16"),
}
SAME_NOISE = "Gaussian, float updates, Skellam's noise"


def run(seed: int, rounds: int, *overrides: str) -> dict[str, Any]:
    common = (f"seed={seed}", f"rounds={rounds}", f"evaluate_every={rounds}")
    with tempfile.TemporaryDirectory() as folder:
        experiment = config.load([*FEDERATION, *common, *overrides])
        return simulation.run_experiment(experiment, Path(folder) / "run").summary


def accuracies(seeds: int, rounds: int, epsilons: tuple[float, ...]) -> list[dict[str, Any]]:
    rows = []

    def add(name: str, epsilon: float | None, *overrides: str) -> float | None:
        runs = [run(seed, rounds, *overrides) for seed in range(seeds)]
        found = [one["accuracy"] for one in runs]
        private = runs[0].get("privacy", {})
        rows.append(
            {
                "mechanism": name,
                "epsilon": epsilon,
                "stated": private.get("epsilon"),
                "noise_multiplier": private.get("noise_multiplier"),
                "accuracy": statistics.mean(found),
                "spread": statistics.stdev(found) if seeds > 1 else 0.0,
                "bits": runs[0]["uplink_bits_per_parameter"],
                "accuracies": found,
            }
        )
        print(rows[-1], flush=True)
        noise: float | None = rows[-1]["noise_multiplier"]
        return noise

    add("none", None)
    for epsilon in epsilons:
        budget = (f"privacy.epsilon={epsilon}", f"privacy.delta={DELTA}")
        noise = {name: add(name, epsilon, *o, *budget) for name, o in MECHANISMS.items()}
        given = (f"privacy.noise_multiplier={noise['Skellam, 16 bits']!r}", budget[1])
        add(SAME_NOISE, epsilon, "privacy=gaussian", *given)
    return rows


def speeds(seed: int, parameters: int, repeats: int) -> list[dict[str, Any]]:
    x = np.random.default_rng(seed).normal(size=parameters).astype(np.float32)
    about = Round(number=1, seed=seed, cohort=100, size=parameters)
    rng, entropy = np.random.default_rng(seed), Entropy(seed)

    def numpy_gaussian() -> None:
        x * np.float32(1 / np.linalg.norm(x)) + rng.standard_normal(parameters, np.float32)

    tasks: dict[str, tuple[float, Callable[[], object]]] = {
        "NumPy's float32 Gaussian": (32.0, numpy_gaussian)
    }
    for label, name, options in (
        ("discrete Gaussian, 16 bits", "discrete_gaussian", {}),
        ("Skellam, 16 bits", "skellam", {}),
        ("Poisson-binomial, 1 level", "poisson_binomial", {}),
        ("Poisson-binomial, 16 levels", "poisson_binomial", {"levels": 16}),
    ):
        encoder = build("privacy", name, noise_multiplier=1.0, **options).encoder(about)
        bits = float(encoder.largest.bit_length())
        tasks[label] = (bits, lambda encoder=encoder: encoder.encode(x, entropy))
    total = x.astype(np.float64)
    tasks["server: exact discrete Gaussian on the sum"] = (
        32.0,
        lambda: noisy_sum(total, 1.0, 1.0, 100, entropy),
    )
    rows = []
    for label, (bits, task) in tasks.items():
        task()  # compiles, and builds tables
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            task()
            seconds.append(time.process_time() - start)
        rows.append({"what": label, "ms": 1e3 * statistics.median(seconds), "bits": bits})
    for row in rows:
        row["ratio"] = row["ms"] / rows[0]["ms"]
    return rows


def main() -> None:
    options = _common.parser(__doc__).parse_args()
    logging.getLogger("fedq").setLevel(logging.ERROR)
    quick = options.quick
    fast = speeds(options.seed, PARAMETERS // (10 if quick else 1), 1 if quick else 7)
    rows = accuracies(*((1, 2, (10.0,)) if quick else (SEEDS, 20, EPSILONS)))
    columns = {
        "mechanism": "mechanism",
        "epsilon": "epsilon",
        "noise_multiplier": "noise multiplier",
        "accuracy": "accuracy",
        "spread": "standard deviation",
        "bits": "uplink bits per parameter",
    }
    text = [
        __doc__.split("\n\n", 1)[1].strip() if __doc__ else "",
        f"Accuracy after {2 if quick else 20} rounds, mean of {1 if quick else SEEDS} seeds; "
        f"client level, delta {DELTA}, no amplification by sampling:",
        _common.table(columns, rows),
        f"CPU time of one core for {PARAMETERS // (10 if quick else 1):,} parameters, 100 clients, "
        "noise multiplier 1:",
        _common.table(
            {"what": "what", "ms": "ms", "ratio": "times NumPy's", "bits": "bits per code"}, fast
        ),
    ]
    figures = {"seed": options.seed, "accuracy": rows, "speed": fast}
    _common.write(options.out, "privacy", "Privacy", text, figures)


if __name__ == "__main__":
    main()
