"""How ``engine.py`` drives a contestant: it prepares itself, then runs rounds when told to.

Between two orders a contestant does nothing, so that several can take turns on one machine.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Driver:
    """A contestant's end of the line."""

    def __init__(self) -> None:
        self._file = socket.socket(fileno=int(sys.argv[1])).makefile("rwb")
        self.work: dict[str, Any] = self._read()

    def serve(self, run: Callable[[int], None]) -> None:
        """Call ``run(rounds)`` as ordered until the line closes."""
        while order := self._read():
            start = time.perf_counter()
            run(order["rounds"])
            self._write({"seconds": time.perf_counter() - start})

    def _read(self) -> Any:
        line = self._file.readline()
        return json.loads(line) if line else None

    def _write(self, answer: Any) -> None:
        self._file.write(json.dumps(answer).encode() + b"\n")
        self._file.flush()

    def save(self, weights: Callable[[], NDArray[np.float32]]) -> None:
        """Leave the global model where the engine benchmark looks for proof of training."""
        if self.work["weights_to"]:
            np.save(self.work["weights_to"], weights())

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """``x``: (clients, n, 1, 28, 28) float32, ``y``: (clients, n), ``weights``: (d,)."""
        return load(self.work["arrays"])


def load(path: str) -> dict[str, NDArray[Any]]:
    """Read the arrays that all contestants share."""
    with np.load(Path(path)) as file:
        return dict(file)
