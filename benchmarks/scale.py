"""Time of a round with 100 of 10,000 clients, beside 100 of 100: sampling must not cost.

Every client of both federations has 40 images and the cohort is 100, so that the work is the same.
Both take turns, one process tree each, small_cnn in float. Figures are milliseconds per round, CPU
time of the whole tree and wall time, least and median over the turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _common
from engine import COMMON, FLOAT, Contestant

COHORT, LIMIT = 100, 1.1


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a turn")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    if options.quick:
        options.turns, options.rounds = 2, 1
    rows = measure(options.turns, options.rounds, options.workers, options.seed)
    small, large = rows
    ratios = {
        key: large[key] / small[key]
        for key in ("cpu_ms_min", "cpu_ms_median", "wall_ms_min", "wall_ms_median")
    }
    verdict = (
        f"10,000 clients to 100: CPU {ratios['cpu_ms_min']:.3f} (median "
        f"{ratios['cpu_ms_median']:.3f}), wall {ratios['wall_ms_min']:.3f} (median "
        f"{ratios['wall_ms_median']:.3f}); the limit is {LIMIT}."
    )
    columns = {
        "clients": "clients",
        "cpu_ms_min": "CPU ms/round, least",
        "cpu_ms_median": "median",
        "wall_ms_min": "wall ms/round, least",
        "wall_ms_median": "median wall",
        "server_peak_mb": "server peak, MB",
        "startup_s": "start-up, s",
    }
    _common.write(
        options.out,
        "scale",
        "Ten thousand clients",
        [str(__doc__).strip(), _common.table(columns, rows), verdict],
        {"seed": options.seed, "limit": LIMIT, "ratios": ratios, "rows": rows},
    )


def measure(turns: int, rounds: int, workers: int, seed: int) -> list[dict[str, Any]]:
    """Let both federations take turns."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contestants: list[Contestant] = []
        for clients in (COHORT, 10_000):
            work = {
                "options": [*COMMON, *FLOAT, f"clients_per_round={COHORT}", f"seed={seed}"],
                "federation": clients,
                "cohort": COHORT,
                "workers": workers,
                "weights_to": None,
            }
            log = Path(folder) / f"{clients}.log"
            contestant = Contestant.start(f"{clients}", sys.executable, "fedq_local.py", work, log)
            stack.callback(contestant.close)
            contestant.order(1)
            contestants.append(contestant)
        for turn in range(turns):
            for contestant in contestants[:: 1 if turn % 2 else -1]:
                contestant.turns.append(contestant.measure(rounds))
        return [_row(contestant) for contestant in contestants]


def _row(contestant: Contestant) -> dict[str, Any]:
    cpu = [turn["cpu"] * COHORT for turn in contestant.turns]
    wall = [turn["wall"] * COHORT for turn in contestant.turns]
    return {
        "clients": int(contestant.name),
        "cpu_ms_min": min(cpu),
        "cpu_ms_median": statistics.median(cpu),
        "wall_ms_min": min(wall),
        "wall_ms_median": statistics.median(wall),
        "server_peak_mb": _common.peak_resident_mb(contestant.process.pid),
        "startup_s": contestant.startup_s,
    }


if __name__ == "__main__":
    main()
