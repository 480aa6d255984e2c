"""Devices that come and go by chance."""

from __future__ import annotations

from fedq.errors import ConfigError
from fedq.physics.availability.base import Availability
from fedq.physics.devices.base import check_positive
from fedq.random import derive
from fedq.registry import register


def chance(seed: int, client: int, slot: int) -> float:
    """Return a client's number in [0, 1) for a slot of time."""
    return derive(seed, client, slot, "availability") / 2**63


@register("availability", "bernoulli")
class Bernoulli(Availability):
    """Each client with the same probability, drawn anew in every slot of time.

    Args:
      probability: In (0, 1].
      slot_s: Seconds for which a draw holds.

    Example:
      >>> half = Bernoulli(probability=0.5)
      >>> sum(half.available(client, 0.0, seed=0) for client in range(1000))
      500
    """

    probability: float = 0.8
    slot_s: float = 600.0

    def __post_init__(self) -> None:
        check_positive(f"availability={self.name}", self, "slot_s")
        if not 0 < self.probability <= 1:
            raise ConfigError(f"availability.probability must be in (0, 1], not {self.probability}")

    def available(self, client: int, seconds: float, seed: int) -> bool:
        """Whether this slot's draw says so."""
        return chance(seed, client, int(seconds // self.slot_s)) < self.probability
