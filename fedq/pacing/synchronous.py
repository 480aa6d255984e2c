"""Rounds: a cohort is asked, and the round closes when enough of it has answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fedq.errors import ConfigError
from fedq.pacing.base import Pacing
from fedq.registry import register


@register("pacing", "synchronous")
class Synchronous(Pacing):
    """A round waits for its cohort, or for the first of a larger one, or until a deadline.

    Who has not answered by then stops: it has used the energy that it used, and its update is lost.

    Args:
      deadline_s: Simulated seconds after which a round closes; None waits.
      over_selection: Times ``clients_per_round`` that are asked; the first ``clients_per_round``
        replies count. Bonawitz et al. 2019 ask 1.3 times as many.

    Example:
      >>> Synchronous(over_selection=1.3).asked(10, of=100)
      13

    Reference:
      Bonawitz et al. 2019, "Towards federated learning at scale: system design", section 2.
    """

    asynchronous: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"deadline_s": 60.0, "over_selection": 1.3},
    )

    deadline_s: float | None = None
    over_selection: float = 1.0

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not 0 < self.deadline_s < math.inf:
            raise ConfigError(
                f"pacing.deadline_s must be positive simulated seconds, or null, not "
                f"{self.deadline_s}"
            )
        if not 1 <= self.over_selection <= 10:
            raise ConfigError(f"pacing.over_selection must be 1 to 10, not {self.over_selection}")

    @property
    def timed(self) -> bool:
        """Whether it does more than wait for all."""
        return self.deadline_s is not None or self.over_selection > 1

    def asked(self, wanted: int, of: int) -> int:
        """Return how many are asked where ``wanted`` are to answer, of those that there are."""
        return min(math.ceil(round(wanted * self.over_selection, 9)), of)

    def first(self, wanted: int, sampled: int) -> int | None:
        """Return how many replies count of a larger cohort."""
        return min(wanted, sampled) if self.over_selection > 1 else None
