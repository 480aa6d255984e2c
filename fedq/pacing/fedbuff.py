"""No rounds: the server steps whenever so many updates are in (Nguyen et al. 2022, FedBuff)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedq.errors import ConfigError
from fedq.pacing.base import Pacing
from fedq.registry import register


@register("pacing", "fedbuff")
class FedBuff(Pacing):
    """Step with every ``buffer`` updates, however old the models that they were trained from.

    ``clients_per_round`` clients train at any time; one that is done, or died, is replaced at once,
    by one that gets the model of the moment. An update that s steps were taken since counts ::

        delta <- delta / (1 + s)**exponent

    and the step is the mean of ``buffer`` of them. A "round" is a step of the server. A client is
    asked at most once per step, so that its randomness is its own; if all have been, the server
    steps with what it has.

    Args:
      buffer: Updates per step, K.
      exponent: Of the discount of old updates; 0 is none.

    Example:
      >>> FedBuff().discount(0), FedBuff().discount(3)
      (1.0, 0.5)

    Reference:
      Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation", algorithm 1;
      the discount is that of section 5.
    """

    asynchronous: ClassVar[bool] = True
    deadline_s: ClassVar[None] = None  # type: ignore[misc]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"buffer": 4, "exponent": 0.0})

    buffer: int = 10
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise ConfigError(f"pacing.buffer must be at least 1, not {self.buffer}")
        if not 0 <= self.exponent <= 10:
            raise ConfigError(f"pacing.exponent must be 0 to 10, not {self.exponent}")

    def expected(self, sampled: int) -> int:
        """Return ``buffer``."""
        return self.buffer

    def discount(self, steps: int) -> float:
        """Return what an update counts that ``steps`` steps were taken since."""
        return float((1 + steps) ** -self.exponent)
