"""Latency and memory of a written file, and of its float twin beside it in the same runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedq.errors import FedqError
from fedq.export import runner

_TURNS = 25
_TURN_S = 0.01


def latencies_us(
    networks: Sequence[runner.Network], example: NDArray[np.float32], turn_s: float = _TURN_S
) -> NDArray[np.float64]:
    """Return the CPU time of one invocation of each network, in microseconds: (turns, networks).

    They take short turns, so that what else the machine does slows all alike, and ratios within a
    turn compare. CPU time of this process does not grow while others run, but caches are shared.
    """
    counts = []
    for network in networks:
        network.put(example)
        network.invoke()
        counts.append(max(1, round(turn_s / max(_seconds(network, 3), 1e-7))))
    return 1e6 * np.array(
        [
            [_seconds(network, count) for network, count in zip(networks, counts, strict=True)]
            for _ in range(_TURNS)
        ]
    )


def _seconds(network: runner.Network, count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        network.invoke()
    return (time.process_time() - start) / count


def memory_mb(model: Path, examples: NDArray[np.float32], folder: Path) -> tuple[float, bool]:
    """Return what loading and running a model adds to a fresh process, and whether torch came.

    The process is the runner as a device starts it, without fedq.

    Args:
      model: The file, ``export.json`` beside it.
      examples: As stored, channels last.
      folder: For what the process reads.
    """
    data = folder / "examples.npz"
    np.savez(data, x=examples)
    command = [sys.executable, "-I", runner.__file__, str(model), "--data", str(data), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FedqError(f"the runner fails on {model.name}: {done.stderr.strip()[-500:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return float(result["memory_mb"]), bool(result["torch"])
