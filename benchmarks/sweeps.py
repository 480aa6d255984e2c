"""What `fedq simulate -m` costs beside the runs themselves, in CPU and in wall time.

The same runs are done twice: by one sweep, and one after another in one process that has imported
everything already (`fedq.simulation.run_experiment`), which is the least that they can cost. CPU is
of the whole tree of processes. The sweep's imports, plan, manifests, display and processes are its
overhead; its report at the end is measured by `benchmarks/report.py` and not counted here.
"""

from __future__ import annotations

import contextlib
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import _common
from rich.console import Console

from fedq import config, manifest, progress, simulation, sweep
from fedq.data.base import load
from fedq.threads import usable_cores

GRID = ("codec=uniform,qsgd,eden,sign", "baseline=false", "engine.workers=1")


@contextlib.contextmanager
def measured(into: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU and wall seconds of a block to ``into``."""

    def cpu() -> float:
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    wall, before = time.perf_counter(), cpu()
    yield
    into[f"{name}_cpu_s"] = into.get(f"{name}_cpu_s", 0.0) + cpu() - before
    into[f"{name}_wall_s"] = into.get(f"{name}_wall_s", 0.0) + time.perf_counter() - wall


def main() -> None:
    options = _common.parser(__doc__)
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    rounds, repeats = (2, 1) if chosen.quick else (chosen.rounds, chosen.repeats)
    small = ("data=digits", "clients=6") if chosen.quick else ()
    cells = config.sweep([*GRID, f"rounds={rounds}", f"seed={chosen.seed}", *small])
    found: dict[str, float] = {}
    experiments = [config.load(cell) for cell in cells]
    for experiment in experiments[:1]:  # kernels are compiled, and the file cache is warm
        load(experiment.data)
        with tempfile.TemporaryDirectory() as folder:
            simulation.run_experiment(experiment.replace(rounds=1), Path(folder, "warm"))
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder, measured(found, "alone"):
            for number, experiment in enumerate(experiments):
                simulation.run_experiment(experiment, Path(folder, str(number)))
        with tempfile.TemporaryDirectory() as folder, measured(found, "sweep"):
            manifest.provenance.cache_clear()
            base, console = Path(folder), Console(stderr=True)
            planned = sweep.plan(base, cells)
            with progress.cells(console, len(planned)) as display:
                sweep.run(base, planned, display, jobs=1)
    rows = [
        {"what": "runs alone", "cpu": found["alone_cpu_s"], "wall": found["alone_wall_s"]},
        {
            "what": "sweep, one at a time",
            "cpu": found["sweep_cpu_s"],
            "wall": found["sweep_wall_s"],
        },
    ]
    cpu = found["sweep_cpu_s"] / found["alone_cpu_s"] - 1
    wall = found["sweep_wall_s"] / found["alone_wall_s"] - 1
    _common.write(
        chosen.out,
        "sweeps",
        "What a sweep costs beside its runs",
        [
            f"{repeats} times {len(cells)} runs of {rounds} rounds of the main job (seed "
            f"{chosen.seed}) on {usable_cores()} cores. Overhead: {100 * cpu:.1f} % of CPU, "
            f"{100 * wall:.1f} % of wall time.",
            _common.table({"what": "what", "cpu": "CPU s", "wall": "wall s"}, rows),
        ],
        {**found, "cpu_overhead": cpu, "wall_overhead": wall, "rounds": rounds},
    )


if __name__ == "__main__":
    main()
