"""Devices that are idle, charged and on line at night."""

from __future__ import annotations

import math

from fedq.errors import ConfigError
from fedq.physics.availability.base import Availability
from fedq.physics.availability.bernoulli import chance
from fedq.physics.devices.base import check_positive
from fedq.random import derive
from fedq.registry import register


@register("availability", "diurnal")
class Diurnal(Availability):
    """More clients by night than by day.

    With the probability ::

        p(t) = (low + high) / 2 + (high - low) / 2 * cos(2 pi (t - offset) / period)

    drawn per client and slot. Bonawitz et al. 2019 ("Towards federated learning at scale", figure
    5) see four times as many devices by night as by day in one country: the defaults.

    Args:
      low: Probability by day.
      high: Probability by night; a run begins at midnight.
      zones: Time zones, evenly spaced over the period, among which clients are drawn.
      period_s: Seconds of a day.
      slot_s: Seconds for which a draw holds.
    """

    low: float = 0.2
    high: float = 0.8
    zones: int = 1
    period_s: float = 86_400.0
    slot_s: float = 1800.0

    def __post_init__(self) -> None:
        check_positive(f"availability={self.name}", self, "period_s", "slot_s", "zones")
        if not 0 <= self.low <= self.high <= 1 or self.high == 0:
            raise ConfigError(
                "availability.low and high must be probabilities, low no more than high, "
                f"and high not 0; not {self.low} and {self.high}"
            )

    def available(self, client: int, seconds: float, seed: int) -> bool:
        """Whether this slot's draw is below the curve."""
        slot = int(seconds // self.slot_s)
        zone = derive(seed, client, "zone") % self.zones
        phase = slot * self.slot_s / self.period_s - zone / self.zones
        mean, swing = (self.low + self.high) / 2, (self.high - self.low) / 2
        return chance(seed, client, slot) < mean + swing * math.cos(2 * math.pi * phase)
