"""Devices as somebody saw them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from fedq.errors import ConfigError
from fedq.physics.availability.base import Availability
from fedq.physics.devices.base import check_positive
from fedq.registry import register


@register("availability", "trace")
class Trace(Availability):
    """Spans of time from a file, repeated without end.

    The file is CSV with a header: ``client,start_s,end_s``. Client i of the federation takes the
    spans of the i-th client of the file, in order of their numbers, over and over if there are more
    clients than there.

    Args:
      path: The file.
      period_s: Seconds after which the trace begins again.
      slot_s: How often the server looks who is there, if nobody is.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    path: str
    period_s: float = 86_400.0
    slot_s: float = 60.0

    def __post_init__(self) -> None:
        check_positive(f"availability={self.name}", self, "period_s", "slot_s")
        _spans(self.path)  # now, not in the middle of a run

    def available(self, client: int, seconds: float, seed: int) -> bool:
        """Whether the time is within a span of the client's."""
        spans = _spans(self.path)
        at = seconds % self.period_s
        return any(start <= at < end for start, end in spans[client % len(spans)])


@cache
def _spans(path: str) -> tuple[tuple[tuple[float, float], ...], ...]:
    found: dict[int, list[tuple[float, float]]] = {}
    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                start, end = float(row["start_s"]), float(row["end_s"])
                if not 0 <= start < end:
                    raise ValueError
                found.setdefault(int(row["client"]), []).append((start, end))
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, csv.Error):
        raise ConfigError(
            f"{path} is no trace: it needs the columns client,start_s,end_s, with 0 <= start < end"
        ) from None
    if not found:
        raise ConfigError(f"the trace {path} has no spans")
    return tuple(tuple(sorted(found[client])) for client in sorted(found))
