"""The main job, ``fedq simulate`` without options, from a cold start to the files on disk.

Each seed is a process of its own: int8 QAT with dithered uplink and predictive downlink, and float
FedAvg beside it as the baseline. Wall time is from the start of Python to its end, baseline
included. Bytes are lengths of all messages of a run; ``times fewer`` compares with the baseline's.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common

COMMAND = "from fedq.cli import main; raise SystemExit(main())"
QUICK = ("rounds=2", "data=digits", "clients=6", "clients_per_round=3")


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="options of fedq simulate, as rounds=10")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.overrides = options.seeds[:1], [*QUICK, *options.overrides]
    rows = [run(seed, options.overrides) for seed in options.seeds]
    columns = {
        "seed": "seed",
        "seconds": "wall, s",
        "cpu_seconds": "CPU, s",
        "accuracy": "accuracy",
        "baseline_accuracy": "float FedAvg",
        "uplink_mb": "uplink, MB",
        "downlink_mb": "downlink, MB",
        "uplink_ratio": "uplink, times fewer",
        "downlink_ratio": "downlink, times fewer",
        "uplink_bits_per_parameter": "uplink, bits/parameter",
        "downlink_bits_per_parameter": "downlink, bits/parameter",
    }
    summary = {key: _spread([row[key] for row in rows]) for key in columns if key != "seed"}
    shown = [*(_text(row) for row in rows)]
    for which in ("mean", "min", "max"):
        shown += [{"seed": which, **_text({key: v[which] for key, v in summary.items()})}]
    text = [str(__doc__).strip(), _common.table(columns, shown)]
    if options.overrides:
        text.insert(1, f"Options: `{' '.join(options.overrides)}`.")
    _common.write(
        options.out,
        "main_job",
        "The main job",
        text,
        {"seeds": options.seeds, "overrides": options.overrides, "summary": summary, "rows": rows},
    )


def run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """Run the job with one seed and return what it cost and what it gave."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        arguments = [sys.executable, "-c", COMMAND, "simulate", f"seed={seed}", f"run_dir={path}"]
        load = os.getloadavg()
        cpu, start = _children_cpu_seconds(), time.perf_counter()
        subprocess.run([*arguments, *overrides], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        cpu = _children_cpu_seconds() - cpu
        own = json.loads((path / "summary.json").read_text())
        baseline = json.loads((path / "baseline" / "summary.json").read_text())
    return {
        "seed": seed,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "load_average": load,
        "accuracy": own["accuracy"],
        "float_twin_accuracy": own["float_accuracy"],
        "baseline_accuracy": baseline["accuracy"],
        "uplink_bytes": own["uplink_bytes"],
        "downlink_bytes": own["downlink_bytes"],
        "baseline_uplink_bytes": baseline["uplink_bytes"],
        "baseline_downlink_bytes": baseline["downlink_bytes"],
        "uplink_mb": own["uplink_bytes"] / 1e6,
        "downlink_mb": own["downlink_bytes"] / 1e6,
        "uplink_ratio": baseline["uplink_bytes"] / own["uplink_bytes"],
        "downlink_ratio": baseline["downlink_bytes"] / own["downlink_bytes"],
        "uplink_bits_per_parameter": own["uplink_bits_per_parameter"],
        "downlink_bits_per_parameter": own["downlink_bits_per_parameter"],
        "rounds": own["rounds"],
        "codec": own["codec"],
        "downlink": own["downlink"],
    }


def _children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def _text(row: dict[str, Any]) -> dict[str, Any]:
    """Show accuracies in per cent, to a tenth."""
    shown = dict(row)
    for key in ("accuracy", "baseline_accuracy"):
        shown[key] = f"{100 * row[key]:.1f} %"
    return shown


if __name__ == "__main__":
    main()
