"""What a fleet is: a device and a link for every client, and what goes wrong with them."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedq.physics.availability.always import Always
from fedq.physics.availability.base import Availability
from fedq.physics.devices.base import Device
from fedq.physics.links.base import Link


@dataclass(frozen=True)
class Member:
    """One client's device and link."""

    device: Device
    link: Link


class Fleet(abc.ABC):
    """Which devices and links clients have; registered, frozen."""

    group: ClassVar[str] = "fleet"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    #: Whether the fleet takes simulated time at all.
    timed: ClassVar[bool]

    @property
    def availability(self) -> Availability:
        """When clients can be asked."""
        return Always()

    @property
    def straggler_sigma(self) -> float:
        """Of the natural logarithm of how much longer a client trains in a round."""
        return 0.0

    @property
    def dropout(self) -> float:
        """Probability that a client that was asked dies before it has sent its update."""
        return 0.0

    @abc.abstractmethod
    def members(self, clients: int, seed: int) -> list[Member]:
        """Return every client's device and link, in the order of their places."""
