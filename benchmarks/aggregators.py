"""Robust aggregation of 100 clients of 1,000,000 parameters: one core's time, and memory.

Each row is a process of its own with one thread. Updates are float32, drawn anew; kernels are
compiled before. Time is CPU time of the process, the best of three calls for ours and of one for
the peer. Memory is the input and what the process held beside it at its highest (`VmHWM`), over the
input. Beside ours run ByzFL's rules of the same name on the same NumPy array (`pip install
--no-deps byzfl`), under a limit of 12 GB and 10 minutes. f = 20.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
import numpy as np

from fedq import build

HOSTILE = 20
LIMIT_S, LIMIT_GB = 3.0, 12.0
LIMIT_RATIO, TIMEOUT_S = 1.3, 600
#: By row: our name and options, and ByzFL's rules, applied in turn.
RULES: dict[str, tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]]]] = {
    "trimmed mean": ("trimmed_mean", {"trim": 0.2}, [("TrMean", {"f": HOSTILE})]),
    "median": ("median", {}, [("Median", {})]),
    "Multi-Krum": ("multi_krum", {"f": HOSTILE}, [("MultiKrum", {"f": HOSTILE})]),
    "NNM + Multi-Krum": (
        "nearest_neighbour_mixing",
        {"f": HOSTILE, "inner": {"name": "multi_krum", "f": HOSTILE}},
        [("NNM", {"f": HOSTILE}), ("MultiKrum", {"f": HOSTILE})],
    ),
    "geometric median": ("geometric_median", {}, [("GeometricMedian", {})]),
    "mean": ("mean", {}, [("Average", {})]),
    "Krum": ("krum", {"f": HOSTILE}, [("Krum", {"f": HOSTILE})]),
    "NNM + trimmed mean": (
        "nearest_neighbour_mixing",
        {"f": HOSTILE, "inner": {"name": "trimmed_mean", "trim": 0.2}},
        [("NNM", {"f": HOSTILE}), ("TrMean", {"f": HOSTILE})],
    ),
    "Bulyan": ("bulyan", {"f": HOSTILE}, []),
    "centered clipping": ("centered_clipping", {}, [("CenteredClipping", {})]),
    "norm-bounded mean": ("norm_bounded", {}, [("Clipping", {"c": 100.0}), ("Average", {})]),
    "bucketing + geometric median": (
        "bucketing",
        {"size": 2},
        [("Bucketing", {"s": 2}), ("GeometricMedian", {})],
    ),
    "MoNNA": ("monna", {"f": HOSTILE}, [("MoNNA", {"f": HOSTILE})]),
    "FLTrust": ("fltrust", {}, []),
    "FLAME": ("flame", {}, []),
    "DnC": ("dnc", {"f": HOSTILE}, []),
    "sign vote": ("sign_vote", {}, []),
}
#: The rules that the measure is about.
MEASURED = ("trimmed mean", "median", "Multi-Krum", "NNM + Multi-Krum", "geometric median")


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(**json.loads(options.row))))
        return
    shape = (100, 5_000) if options.quick else (100, 1_000_000)
    rules = ("median", "MoNNA", "DnC") if options.quick else tuple(RULES)
    rows = []
    for name in rules:
        theirs = RULES[name][2]
        ours = run({"name": name, "peer": False, "shape": shape, "seed": options.seed})
        row = {"name": name, "seconds": ours["seconds"], "ratio": ours["ratio"]}
        if theirs and importlib.util.find_spec("byzfl"):
            found = run({"name": name, "peer": True, "shape": shape, "seed": options.seed})
            row |= {f"byzfl_{key}": value for key, value in found.items()}
            if "seconds" in found:
                row["faster"] = found["seconds"] / ours["seconds"]
        rows.append(row)
        print(row, file=sys.stderr)
    columns = {
        "name": "rule",
        "seconds": "CPU, s",
        "ratio": "memory / input",
        "byzfl_seconds": "ByzFL CPU, s",
        "byzfl_ratio": "ByzFL memory / input",
        "byzfl_fails": "ByzFL fails",
        "faster": "times faster",
    }
    measured = [row for row in rows if row["name"] in MEASURED]
    slowest = max(row["seconds"] for row in measured)
    largest = max(row["ratio"] for row in measured)
    verdict = (
        f"Of {', '.join(MEASURED)}, the slowest takes {slowest:.2f} s (limit {LIMIT_S:g} s) and "
        f"the largest needs {largest:.2f} times its input (limit {LIMIT_RATIO})."
    )
    _common.write(
        options.out,
        "aggregators",
        "Robust aggregation",
        [str(__doc__).strip(), _common.table(columns, rows), verdict],
        {"seed": options.seed, "shape": shape, "rows": rows},
    )


def run(row: dict[str, Any]) -> dict[str, Any]:
    """Measure a row in a process of its own; ``fails`` says why there is no figure."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--row", json.dumps(row)],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return {"fails": f"not done in {TIMEOUT_S} s"}
    if done.returncode:
        if row["peer"]:
            return {"fails": done.stderr.strip().splitlines()[-1].split(":")[0].split(".")[-1]}
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(name: str, peer: bool, shape: list[int], seed: int) -> dict[str, float]:
    """Aggregate once or more; this process does nothing else."""
    rule = byzfl_rule(RULES[name][2]) if peer else our_rule(*RULES[name][:2], shape[1])
    n, d = shape
    rng = np.random.default_rng(seed)
    small = rng.standard_normal((n, 1000), np.float32)
    rule(small)  # compiled, imported
    updates = np.empty((n, d), np.float32)
    for row in updates:
        rng.standard_normal(d, np.float32, out=row)
        row += np.float32(0.5)
    if peer:
        limit = int(LIMIT_GB * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = _common.peak_resident_mb()
    seconds = []
    for _ in range(1 if peer else 3):
        start = time.process_time()
        rule(updates)
        seconds.append(time.process_time() - start)
    size = updates.nbytes / 1e6
    held = _common.peak_resident_mb() - before
    return {"seconds": min(seconds), "ratio": (size + held) / size}


def our_rule(name: str, options: dict[str, Any], d: int) -> Callable[[Any], Any]:
    """Return our rule over an array."""
    rule = build("aggregator", name, **options)
    own = np.full(d, 0.5, np.float32)
    return lambda updates: rule(updates, np.ones(len(updates)), own[: updates.shape[1]])


def byzfl_rule(parts: list[tuple[str, dict[str, Any]]]) -> Callable[[Any], Any]:
    """Return ByzFL's rules in turn; its ``__init__`` needs torchvision, its rules do not."""
    spec = importlib.util.find_spec("byzfl")
    assert spec is not None
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["byzfl"] = package
    known: dict[str, Any] = {}
    for module in ("aggregators", "preaggregators"):
        known |= vars(importlib.import_module(f"byzfl.aggregators.{module}"))
    rules = [known[name](**options) for name, options in parts]

    def apply(updates: Any) -> Any:
        for rule in rules:
            updates = rule(updates)
        return updates

    return apply


if __name__ == "__main__":
    main()
