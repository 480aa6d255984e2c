"""What a device has learnt of itself at work: how fast it trains, and how fast its link sends.

Measured on what was done anyway, and the uplink once more at each start. Kept on disk: written when
a figure has changed by a quarter, or decides otherwise, which is seldom.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fedq.capacity import Capacity
from fedq.fleet.files import write_json

#: A piece of an update takes about so long: what a failure costs, and no timeout sees.
PIECE_S = 10.0
LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 16 << 10, 1 << 20
#: Less tells of latency, not of speed.
LEAST_SENT_BYTES = 16 << 10
CHANGE = 1.25


@dataclass(frozen=True)
class Profile:
    """Measured speeds; None where there was nothing to measure yet.

    Attributes:
      images_s: Training examples in a second, with all else that a round takes on the device.
      up_bytes_s: Of the uplink.
    """

    images_s: float | None = None
    up_bytes_s: float | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return what is on disk; nothing known if that is not readable."""
        try:
            data = json.loads(path.read_text())
            return cls(**{name: positive(data.get(name)) for name in ("images_s", "up_bytes_s")})
        except (OSError, ValueError, AttributeError):
            return cls()

    def trained(self, images: int, seconds: float) -> Self:
        """Return the profile after a training."""
        if images < 1 or seconds <= 0:
            return self
        return replace(self, images_s=_digits(images / seconds))

    def sent(self, size_bytes: int, seconds: float) -> Self:
        """Return the profile after an update was sent."""
        if size_bytes < LEAST_SENT_BYTES or seconds <= 0:
            return self
        return replace(self, up_bytes_s=_digits(size_bytes / seconds))

    def save(self, path: Path) -> None:
        """Write the profile if it differs from what is on disk by enough to matter."""
        before = self.read(path)
        # A reply that was begun is the same after a kill.
        if before.chunk_bytes(0) == self.chunk_bytes(0) and self.like(before):
            return
        with contextlib.suppress(OSError):  # a full disk
            write_json(path, self.report())

    def like(self, before: Profile) -> bool:
        """Whether no figure differs by enough to matter."""
        return all(_close(getattr(before, name), value) for name, value in self.report().items())

    def report(self) -> dict[str, Any]:
        """Return what is known."""
        known = {"images_s": self.images_s, "up_bytes_s": self.up_bytes_s}
        return {name: value for name, value in known.items() if value is not None}

    def chunk_bytes(self, otherwise: int) -> int:
        """Return the size of the pieces in which an update goes up, a power of two.

        >>> Profile(up_bytes_s=20_000).chunk_bytes(1 << 20)
        131072
        """
        if self.up_bytes_s is None:
            return otherwise
        piece = 1 << math.floor(math.log2(max(self.up_bytes_s * PIECE_S, 1)))
        return min(max(piece, LEAST_PIECE_BYTES), MOST_PIECE_BYTES)


def capacity_of(report: Mapping[str, Any]) -> Capacity:
    """Return what a device's report says that it can do."""
    up_bytes_s = positive(report.get("up_bytes_s"))
    uplink_mbps = None if up_bytes_s is None else 8e-6 * up_bytes_s
    return Capacity(uplink_mbps, positive(report.get("images_s")))


def positive(value: object) -> float | None:
    """Return a figure that is one; None for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < value < math.inf else None  # type: ignore[arg-type,operator]


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def _close(before: float | None, now: float) -> bool:
    return before is not None and max(before, now) < CHANGE * min(before, now)
