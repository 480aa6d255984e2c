"""A fleet of several kinds of devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fedq.errors import ConfigError
from fedq.physics.availability.always import Always
from fedq.physics.availability.base import Availability
from fedq.physics.devices.base import Device
from fedq.physics.fleets.base import Fleet, Member
from fedq.physics.links.base import Link
from fedq.random import derive, generator
from fedq.registry import register


@register("fleet", "mixture")
class Mixture(Fleet):
    """Kinds of devices with their links, in given shares; who is which follows from the seed.

    Args:
      devices: One per kind.
      links: One per kind.
      shares: Of the clients, one per kind, summing to 1; equal ones if empty. Counts are rounded
        by largest remainder.
      availability: When clients can be asked.
      straggler_sigma: A client's training takes ``exp(sigma z)`` times as long in a round, z
        standard normal; 0 is off.
      dropout: Probability that a client that was asked dies before it has sent its update; it
        trained in vain.

    Example:
      >>> from fedq.registry import build
      >>> fleet = build("fleet", "mixture", devices=["pi_4", "pi_5"], links=["wifi", "lte_m"],
      ...               shares=[0.75, 0.25])
      >>> sorted(member.device.name for member in fleet.members(4, seed=0))
      ['pi_4', 'pi_4', 'pi_4', 'pi_5']
    """

    timed: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"devices": ["pi_4"], "links": ["wifi"]},
        {"devices": ["pi_4", "pi_zero_2_w"], "links": ["wifi", "nb_iot"], "shares": [0.25, 0.75]},
    )

    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    shares: tuple[float, ...] = ()
    availability: Availability = Always()
    straggler_sigma: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        kinds = len(self.devices)
        if not kinds or len(self.links) != kinds or len(self.shares) not in (0, kinds):
            raise ConfigError(
                "fleet.devices, fleet.links and fleet.shares need one entry per kind of device, "
                f"not {kinds}, {len(self.links)} and {len(self.shares)}"
            )
        if any(not 0 <= share <= 1 for share in self.shares):
            raise ConfigError(f"fleet.shares must be in [0, 1], not {list(self.shares)}")
        if self.shares and abs(math.fsum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"fleet.shares must sum to 1, not {math.fsum(self.shares):g}")
        if not 0 <= self.straggler_sigma <= 5:
            raise ConfigError(
                f"fleet.straggler_sigma must be in [0, 5], not {self.straggler_sigma}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"fleet.dropout must be in [0, 1), not {self.dropout}")

    def members(self, clients: int, seed: int) -> list[Member]:
        """Return every client's device and link, seeded."""
        kinds = len(self.devices)
        wanted = np.array(self.shares or [1 / kinds] * kinds) * clients
        counts = np.floor(wanted + 1e-9).astype(int)
        rest = np.argsort(counts - wanted, kind="stable")[: clients - counts.sum()]
        counts[rest] += 1
        order = generator(derive(seed, "fleet")).permutation(np.repeat(np.arange(kinds), counts))
        members = [Member(*kind) for kind in zip(self.devices, self.links, strict=True)]
        return [members[kind] for kind in order]  # shared: 8 bytes a client
