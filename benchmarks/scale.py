"""What registered clients cost: start-up, memory of the server, and time of a round.

**Whole runs** are `fedq simulate` as a user starts it, with 100,000 and a million registered
clients of 20 MNIST images each (partition=draws), of which 10 take part per round: without a fleet,
on a fleet whose devices come and go, and with FedBuff on that fleet. Start-up is from the start of
the process to the judged round 0, imports of Flower and torch included. Memory is the peak resident
one of the server's process (VmHWM). A registered client's bytes are the slope between 100,000 and a
million.

**Participants**: of 20,000 clients, 4,000 per round answer with a delta of 10 parameters. What a
server remembers of one that has is the slope of its resident memory from the first round to the
fifth, and that of the state's JSON form, which checkpoints hold.

**A round of 100** of 100,000 and of 10,000 clients takes turns with one of 100 of 100: sampling
must not cost. Every client has 40 images, so that the work is the same; one process tree each,
small_cnn in float. Figures are milliseconds per round, CPU time of the whole tree and wall time,
least and median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import _common
import numpy as np
from engine import COMMON, FLOAT, PROCESS, Contestant

from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.engines.local import LocalGrid
from fedq.layout import Layout
from fedq.strategy import FedQ

# isort: split
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

COHORT, LIMIT = 100, 1.1
LIMIT_BYTES, LIMIT_START_S = 100, 20
SIZES = (100_000, 1_000_000)
FLEETS = {
    "no fleet": (),
    "fleet": ("fleet=mixed_iot",),
    "FedBuff": ("fleet=mixed_iot", "pacing=fedbuff"),
}
PARTICIPANTS = Layout.flat(10)


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--turns", type=int, default=6, help="0 leaves them out")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a run or turn")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keeps finished runs, to go on with")
    parser.add_argument("--jobs", type=int, default=1, help="whole runs side by side")
    parser.add_argument("--participants", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.participants:
        print(json.dumps(participants(**json.loads(options.participants))))
        return
    fleets = tuple(FLEETS)
    sizes, small, joining = SIZES, (10_000, 100_000), {"clients": 20_000, "cohort": 4_000}
    if options.quick:
        options.turns, options.rounds = 2, 1
        sizes, small, joining = (100, 3_000), (1_000,), {"clients": 60, "cohort": 20}
        fleets = ("no fleet", "FedBuff")

    def one(case: tuple[str, int]) -> dict[str, Any]:
        name, clients = case
        run = partial(whole_run, name, clients, options.rounds, options.workers, options.seed)
        return _common.kept(options.work, f"{name} {clients}", run)

    cases = [(name, clients) for name in fleets for clients in sizes]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(one, cases))
    slopes = {name: slope(runs, name) for name in fleets}
    joined = _common.kept(options.work, "participants", partial(_separately, joining))
    federations = [COHORT, *small]
    turns = []
    if options.turns:
        turns = take_turns(
            federations, options.turns, options.rounds, options.workers, options.seed
        )
    _common.write(
        options.out,
        "scale",
        "Registered clients",
        [
            str(__doc__).strip(),
            "## Whole runs",
            _common.table(
                {
                    "fleet": "fleet",
                    "clients": "registered",
                    "startup_s": "start-up, s",
                    "startup_cpu_s": "CPU of it, s",
                    "round_s": "round, s",
                    "round_cpu_s": "CPU of it, s",
                    "server_peak_mb": "server peak, MB",
                },
                runs,
            ),
            "Bytes per registered client: "
            + ", ".join(f"{name} {value:.1f}" for name, value in slopes.items())
            + f"; the limit is {LIMIT_BYTES}. Start-up may take {LIMIT_START_S} s.",
            "## Participants",
            f"{joined['bytes_per_client']:.0f} bytes of memory per client that has taken part, and"
            f" {joined['json_bytes_per_client']:.0f} of each checkpoint;"
            f" {joined['cpu_us_per_client']:.0f} us of the server's CPU per request and reply.",
            *compared(turns),
        ],
        {
            "seed": options.seed,
            "limit": LIMIT,
            "limit_bytes": LIMIT_BYTES,
            "limit_startup_s": LIMIT_START_S,
            "runs": runs,
            "bytes_per_client": slopes,
            "participants": joined,
            "rows": turns,
        },
    )


# --- whole runs --------------------------------------------------------------------------------


def whole_run(name: str, clients: int, rounds: int, workers: int, seed: int) -> dict[str, Any]:
    """Run ``fedq simulate`` and look at its processes until it ends."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        start = time.perf_counter()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fedq.cli", "simulate", f"run_dir={run}"),
                *(f"clients={clients}", f"rounds={rounds}", f"seed={seed}", *FLEETS[name]),
                *("partition=draws", f"engine.workers={workers}", "baseline=false"),
            ],
            stdout=subprocess.DEVNULL,
            env={**os.environ, **PROCESS},
        )
        found: dict[str, Any] = {"fleet": name, "clients": clients}
        while process.poll() is None:
            time.sleep(0.25)
            done = len(_lines(run))
            if done and "startup_s" not in found:
                found["startup_s"] = time.perf_counter() - start
                found["startup_cpu_s"] = sum(_common.tree_cpu_seconds(process.pid).values())
            if done > rounds:  # what follows is the plot
                found["server_peak_mb"] = _common.peak_resident_mb(process.pid)
                spent = sum(_common.tree_cpu_seconds(process.pid).values())
                found["round_cpu_s"] = (spent - found["startup_cpu_s"]) / rounds
                break
        process.kill()
        process.wait()
        lines = _lines(run)
    if "round_cpu_s" not in found:
        raise RuntimeError(f"{name}, {clients} clients: {len(lines)} of {rounds} rounds")
    records = [json.loads(line) for line in lines]
    if not all(record["replies"] for record in records[1:]):
        raise RuntimeError(f"{name}, {clients} clients: a round without replies")
    seconds = [record["seconds"] - record["evaluation_seconds"] for record in records[1:]]
    found["round_s"] = statistics.median(seconds)
    print(found, file=sys.stderr)
    return found


def _lines(run: Path) -> list[str]:
    try:
        text = (run / "rounds.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [line for line in text.split("\n") if line.endswith("}")]


def slope(runs: list[dict[str, Any]], name: str) -> float:
    """Return bytes per registered client between the two largest federations."""
    low, high = [run for run in runs if run["fleet"] == name][-2:]
    grown = 1e6 * (high["server_peak_mb"] - low["server_peak_mb"])
    return float(grown / (high["clients"] - low["clients"]))


# --- participants ------------------------------------------------------------------------------


def _separately(work: dict[str, int]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--participants", json.dumps(work)],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, **PROCESS},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    print(found, file=sys.stderr)
    return {**work, **found}


def participants(clients: int, cohort: int) -> dict[str, float]:
    """Let clients take part in five rounds."""
    fedq = FedQ(layout=PARTICIPANTS, codec=Identity(), clients_per_round=cohort)
    state = fedq.initial(np.zeros(PARTICIPANTS.size, np.float32))
    with LocalGrid(_answering, clients, workers=1) as grid:
        state, _ = fedq.run_round(grid, state)
        known, memory, written = len(state.clients), _resident(), _json_bytes(state)
        start = _common.cpu_seconds(os.getpid())
        replies = 0
        for _ in range(4):
            state, report = fedq.run_round(grid, state)
            replies += report.replies
        spent = _common.cpu_seconds(os.getpid()) - start
        joined = len(state.clients) - known
        return {
            "joined": joined,
            "bytes_per_client": (_resident() - memory) / joined,
            "json_bytes_per_client": (_json_bytes(state) - written) / joined,
            "cpu_us_per_client": 1e6 * spent / replies,
        }


def _answering() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        delta = np.full(PARTICIPANTS.size, 0.01, np.float32)
        return Task.open(message, PARTICIPANTS).reply(delta, examples=1, client=client)

    return app


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def _json_bytes(state: Any) -> int:
    """Return the length of what a checkpoint says of single nodes."""
    known = (state.clients, state.broadcasts.held, state.history.examples, state.guard.to_meta())
    return len(json.dumps(known))


# --- turns -------------------------------------------------------------------------------------


def take_turns(
    sizes: list[int], turns: int, rounds: int, workers: int, seed: int
) -> list[dict[str, Any]]:
    """Let federations of several sizes take turns."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contestants: list[Contestant] = []
        for clients in sizes:
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
        rows = [_row(contestant) for contestant in contestants]
    return [{**row, "cpu_ratio": row["cpu_ms_min"] / rows[0]["cpu_ms_min"]} for row in rows]


def compared(turns: list[dict[str, Any]]) -> list[str]:
    """Return what is said of the turns, if there were any."""
    columns = {
        "clients": "clients",
        "cpu_ms_min": "CPU ms/round, least",
        "cpu_ms_median": "median",
        "wall_ms_min": "wall ms/round, least",
        "wall_ms_median": "median wall",
        "cpu_ratio": "least CPU to that of 100",
        "server_peak_mb": "server peak, MB",
    }
    said = f"The limit is {LIMIT} times." if turns else "Left out in this run."
    return ["## A round of 100", *([_common.table(columns, turns)] if turns else []), said]


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
