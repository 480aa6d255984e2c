"""Fewer bits over slower links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from fedq.budgets.base import Budget, Candidate, History
from fedq.errors import ConfigError
from fedq.registry import register


@register("budget", "link_aware")
class LinkAware(Budget):
    """As many bits per coordinate as a client's uplink carries in a given time.

    A client with rate r has ``r * seconds / d`` bits, within ``min_bits`` and ``max_bits``. Without
    ``seconds``, it is the time in which the fleet's median link carries the codec's own bits. An
    entropy coder needs fewer bits than the codec's levels have, so that updates arrive earlier than
    that, all in proportion.

    Args:
      seconds: An update may take; None is what the median link takes.
      min_bits: At least.
      max_bits: At most.

    Example:
      >>> cohort = [Candidate(uplink_mbps=r, median_mbps=1.0) for r in (0.5, 1.0, 1.5)]
      >>> LinkAware().factors(History(), cohort, bits=4.0, size=100)
      [0.25, 1.0, 4.0]
    """

    links: ClassVar[bool] = True

    seconds: float | None = None
    min_bits: int = 2
    max_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"budget.seconds must be positive, or null, not {self.seconds}")

    def factors(
        self, history: History, cohort: Sequence[Candidate], bits: float, size: int
    ) -> list[float]:
        """Return two to the power of the bits that a link's rate gives or takes."""
        return [self._factor(candidate, bits, size) for candidate in cohort]

    def _factor(self, candidate: Candidate, bits: float, size: int) -> float:
        if candidate.uplink_mbps is None or candidate.median_mbps is None:
            return 1.0
        wanted = bits * candidate.uplink_mbps / candidate.median_mbps
        if self.seconds is not None:
            wanted = 1e6 * candidate.uplink_mbps * self.seconds / size
        return float(2 ** (min(max(wanted, self.min_bits), self.max_bits) - bits))
