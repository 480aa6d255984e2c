"""What `fedq watch` costs a run: first paint in headless Chromium, and CPU beside the run's.

A real run goes on while a page is open, which asks every second for what is new. The page's first
contentful paint is what the browser says, from the start of the navigation; CPU is of the process
that serves it, from the moment that it serves until the run has ended, beside that of the run's
processes in that time. The browser, which need not be on this machine, is not counted. Without
playwright and a Chromium, the page is asked for by this script, and there is no first paint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import _common

PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


@contextlib.contextmanager
def page(address: str) -> Iterator[Callable[[], float | None]]:
    """Have a page open; yield what opens it afresh and returns its first paint in ms, if any."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not find_spec("playwright") or chromium is None:
        yield lambda: urllib.request.urlopen(address).close()
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(bypass_csp=True)  # a string is waited for by eval

        def opened() -> float | None:
            tab.goto(address)
            tab.wait_for_function(f"{PAINT} !== null")
            return float(tab.evaluate(PAINT))

        yield opened
        browser.close()


def main() -> None:
    options = _common.parser(__doc__)
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--opens", type=int, default=5, help="first paints")
    chosen = options.parse_args()
    rounds, opens = (3, 1) if chosen.quick else (chosen.rounds, chosen.opens)
    small = ["data=digits", "clients=6", "clients_per_round=3"] if chosen.quick else []
    fedq = [sys.executable, "-m", "fedq.cli"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = Path(folder, "run")
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        simulate = [*fedq, "simulate", "baseline=false", "engine.workers=1", f"run_dir={run}"]
        simulate += [f"rounds={rounds}", f"seed={chosen.seed}", *small]
        running = stack.enter_context(
            subprocess.Popen(simulate, stdout=subprocess.DEVNULL, env=alone)
        )
        stack.callback(running.terminate)
        while not (run / "rounds.jsonl").exists():
            if running.poll() is not None:
                sys.exit(f"the run ended with status {running.returncode}")
            time.sleep(0.05)
        watch = [*fedq, "watch", str(run), "--port", "0"]
        serving = stack.enter_context(subprocess.Popen(watch, stdout=subprocess.PIPE, text=True))
        stack.callback(serving.terminate)
        assert serving.stdout is not None
        address = re.findall(r"http://\S+", serving.stdout.readline())[0]
        started_s, start = _common.cpu_seconds(serving.pid), time.perf_counter()
        before, spent = _common.tree_cpu_seconds(running.pid), 0.0
        paints: list[float] = []
        with page(address) as opened:
            for _ in range(opens):
                paint = opened()
                paints += [] if paint is None else [paint]
            while running.poll() is None:
                now = _common.tree_cpu_seconds(running.pid)
                spent = max(spent, sum(now.values()) - sum(before.get(p, 0.0) for p in now))
                time.sleep(0.2)
        served_s = _common.cpu_seconds(serving.pid) - started_s
        wall_s = time.perf_counter() - start
        summary = json.loads((run / "summary.json").read_text())
    share = served_s / spent if spent else None
    row = {
        "rounds": summary["rounds"],
        "paint": statistics.median(paints) if paints else None,
        "worst": max(paints, default=None),
        "run": spent,
        "served": served_s,
        "share": None if share is None else 100 * share,
        "rate": 1000 * served_s / wall_s,
        "start": started_s,
    }
    columns = {
        "rounds": "rounds",
        "paint": "first paint, ms",
        "worst": "slowest, ms",
        "run": "CPU of the run, s",
        "served": "CPU of fedq watch, s",
        "share": "share, %",
        "rate": "ms of CPU a second",
        "start": "CPU to start it, s",
    }
    _common.write(
        chosen.out,
        "watch",
        "What the live page costs a run",
        [
            f"The main job (seed {chosen.seed}) with one worker; the page opened {opens} times and "
            "left open; median of the first contentful paints. On a crowded machine a run takes "
            "longer, and the page, which asks every second, has a larger share of its CPU: 10 ms a "
            "second are 1 % of a run that has a core to itself.",
            _common.table(columns, [row]),
        ],
        {"seed": chosen.seed, "paints_ms": paints, **row},
    )


if __name__ == "__main__":
    main()
