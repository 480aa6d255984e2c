"""Devices on mains and on line."""

from __future__ import annotations

from fedq.physics.availability.base import Availability
from fedq.registry import register


@register("availability", "always")
class Always(Availability):
    """Every client, at any time."""

    def available(self, client: int, seconds: float, seed: int) -> bool:
        """Return True."""
        return True
