"""No fleet: a run has bytes, and no time or energy of devices."""

from __future__ import annotations

from typing import ClassVar

from fedq.physics.fleets.base import Fleet, Member
from fedq.registry import register


@register("fleet", "none")
class NoFleet(Fleet):
    """Clients without devices: all are there, and replies count as they come."""

    timed: ClassVar[bool] = False

    def members(self, clients: int, seed: int) -> list[Member]:
        """Return nobody."""
        return []
