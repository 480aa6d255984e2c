"""What a device is: how fast it trains and what it draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fedq.errors import ConfigError


class Device:
    """How fast a device trains, and what it draws meanwhile.

    Subclasses are registered frozen dataclasses whose defaults are a profile; a measured figure is
    an option away, e.g. ``{"name": "pi_4", "training_macs_s": 1.6e9}``.

    Attributes:
      training_macs_s: Multiply-accumulates per second in training, forward and backward passes
        alike; effective, not peak.
      idle_watts: Drawn by the board while its radio works and its processor waits.
      active_watts: Drawn by the board while it trains.
    """

    group: ClassVar[str] = "device"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    training_macs_s: float
    idle_watts: float
    active_watts: float

    def __post_init__(self) -> None:
        check_positive(f"device={self.name}", self, "training_macs_s")
        for option in ("idle_watts", "active_watts"):
            value = getattr(self, option)
            if not 0 <= value < math.inf:
                raise ConfigError(f"device={self.name}: {option} must be 0 or more, not {value}")
        if self.active_watts < self.idle_watts:
            raise ConfigError(
                f"device={self.name}: active_watts ({self.active_watts:g}) is less than idle_watts "
                f"({self.idle_watts:g})"
            )


def check_positive(what: str, profile: object, *options: str) -> None:
    """Refuse options that are not positive and finite."""
    for option in options:
        value = getattr(profile, option)
        if not 0 < value < math.inf:
            raise ConfigError(f"{what}: {option} must be positive, not {value}")
