"""What a pacing is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class Pacing:
    """When a round closes, in simulated time; registered, frozen.

    Attributes:
      timed: Whether it needs a fleet, whose clock says when replies arrive.
      asynchronous: Whether clients train from models of different rounds.
    """

    group: ClassVar[str] = "pacing"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    asynchronous: ClassVar[bool]

    @property
    def timed(self) -> bool:
        """Whether it needs a fleet."""
        return True
