"""Seconds of ``fedq report`` over 500 runs that this script makes up.

The runs are of the shape of real ones (configuration, manifest, 100 rounds, summary): 2 tasks, 50
methods and 5 seeds, with simulated time and energy. Keep them with ``--keep DIR`` to look at.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import parser, table, write

from fedq import manifest
from fedq.config import compose_config
from fedq.results import RunDirectory

PARAMETERS, COHORT = 35_000, 10
WHOLE = 4 * PARAMETERS * COHORT


def make_run(
    path: Path, name: str, bits: float, seed: int, config: dict[str, Any], rounds: int
) -> None:
    """Write a run that learns as real ones do: more slowly and less with fewer bits."""
    rng = np.random.default_rng([seed, round(1000 * bits)])
    is_float = bits == 32
    codec = {"name": "identity"} if is_float else {"name": "uniform", "bits": 4}
    settings = config | {"name": name, "seed": seed, "rounds": rounds, "codec": codec}
    settings |= {"downlink": {"name": "identity"}} if is_float else {}
    top = 0.97 - 0.06 / (1 + 4 * bits) + rng.normal(0, 0.003)
    with RunDirectory.create(path, settings) as run:
        manifest.begin(path, settings)
        total = dict.fromkeys(("uplink_bytes", "downlink_bytes"), 0)
        lines = []
        for number in range(rounds + 1):
            accuracy = 0.1 + (top - 0.1) * (1 - math.exp(-number / 8)) + rng.normal(0, 0.002)
            sent = {
                "uplink_bytes": int(WHOLE * bits / 32),
                "downlink_bytes": int(WHOLE * bits / 20),
            }
            sent = {key: value if number else 0 for key, value in sent.items()}
            total = {key: total[key] + sent[key] for key in sent}
            lines.append(
                {
                    "round": number,
                    "accuracy": accuracy,
                    "float_accuracy": accuracy + 0.002,
                    "float32_uplink_bytes": WHOLE,
                    "float32_downlink_bytes": WHOLE,
                    **sent,
                    "rejected": {},
                    "reasons": [],
                    "seconds": 0.5,
                    "loss": 1 - accuracy,
                    "simulated_seconds": 20 + sum(sent.values()) / 12_500 if number else 0,
                    "joules": 8 + sum(sent.values()) / 40_000 if number else 0,
                }
            )
        run._rewrite_rounds(lines)  # one write, not a hundred: the disk is not what is measured
        run.write_summary(
            {
                "name": name,
                "accuracy": accuracy,
                "float_accuracy": accuracy + 0.002,
                "rounds": rounds,
                "parameters": PARAMETERS,
                "seconds": 0.5 * rounds,
                "seed": seed,
                "float32_uplink_bytes": WHOLE * rounds,
                **total,
                "float32_downlink_bytes": WHOLE * rounds,
                "versions": {"fedq": "0.1.0"},
            }
        )


def make_runs(folder: Path, methods: int, seeds: int, rounds: int) -> int:
    """Write the runs of a study; return how many."""
    number = 0
    for partition in ("iid", "dirichlet"):
        config = compose_config([f"partition={partition}"])
        for method in range(methods):
            bits = 32.0 if method == 0 else 0.05 * 1.14**method
            name = "float FedAvg" if method == 0 else f"codec of {bits:.2f} bits"
            for seed in range(seeds):
                number += 1
                make_run(folder / str(number), name, bits, seed, config, rounds)
    return number


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--keep", type=Path, help="directory for the runs and the report")
    chosen = options.parse_args()
    shape = (4, 2, 5) if chosen.quick else (50, 5, 100)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.keep or Path(temporary)
        runs = make_runs(folder, *shape)
        command = [sys.executable, "-m", "fedq.cli", "report", str(folder)]
        before, start = sum(_cpu()), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall, cpu = time.perf_counter() - start, sum(_cpu()) - before
        sizes = {
            path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()
        }
    rows = [{"file": name, "kB": size / 1000} for name, size in sizes.items()]
    write(
        chosen.out,
        "report",
        "fedq report over many runs",
        [
            f"{runs} runs of {shape[2]} rounds: {wall:.1f} s, {cpu:.1f} s of CPU, from the start "
            "of the command to its end.",
            table({"file": "file", "kB": "kB"}, rows),
        ],
        {"runs": runs, "wall_s": wall, "cpu_s": cpu, "bytes": sizes},
    )


def _cpu() -> tuple[float, float]:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime, used.ru_stime


if __name__ == "__main__":
    main()
