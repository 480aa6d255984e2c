"""What a pacing is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class Pacing:
    """When a round closes, in simulated time; registered, frozen.

    Attributes:
      timed: Whether it needs a fleet, whose clock says when replies arrive.
      asynchronous: Whether clients train from models of different rounds, and are asked one by one
        as replies arrive; else a cohort is asked when a round begins.
      deadline_s: Simulated seconds after which a round closes; None waits.
    """

    group: ClassVar[str] = "pacing"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    asynchronous: ClassVar[bool]
    deadline_s: float | None

    @property
    def timed(self) -> bool:
        """Whether it needs a fleet."""
        return True

    def asked(self, wanted: int, of: int) -> int:
        """Return how many are asked where ``wanted`` are to answer, of those that there are."""
        return min(wanted, of)

    def expected(self, sampled: int) -> int:
        """Return how many updates a round is to have that asks so many clients when it begins."""
        return sampled

    def first(self, wanted: int, sampled: int) -> int | None:
        """Return after how many of the cohort's replies a round closes; None waits for all."""
        return None

    def discount(self, steps: int) -> float:
        """Return what an update counts that ``steps`` steps of the server were taken since."""
        return 1.0
