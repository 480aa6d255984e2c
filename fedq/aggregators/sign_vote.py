"""Sign majority vote, Bernstein et al. 2019, https://arxiv.org/abs/1810.05291."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Aggregator, Weights
from fedq.aggregators.blockwise import BLOCK_VALUES
from fedq.aggregators.median import Median
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.registry import register


@register("aggregator", "sign_vote")
class SignVote(Aggregator):
    """Move each coordinate by one step in the direction that most updates vote for (signSGD).

    ``v = step * sign(sum_i sign(u_i))``; a tie, or a majority that abstains with zero, is 0. A vote
    has no size, so any minority is bounded; but hostile voters that agree decide every coordinate
    in which the honest ones do not. Weights are ignored. What is averaged but not trained goes by
    the median. Cost: O(n d).

    Args:
      step: Size of the step; None is the median over updates of their mean magnitude.

    Example:
      >>> SignVote(step=0.5)(np.array([[1, -9], [2, -1], [-99, -1]], np.float32), np.ones(3))
      array([ 0.5, -0.5], dtype=float32)

    Reference:
      Bernstein et al. 2019, "signSGD with majority vote is communication efficient and fault
      tolerant", Algorithm 1.
    """

    step: float | None = None

    translates: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def __post_init__(self) -> None:
        if self.step is not None and not 0 < self.step < np.inf:
            raise ConfigError(f"aggregator.step must be positive or null, not {self.step}")

    @property
    def for_state(self) -> Aggregator:
        """The median."""
        return Median()

    def breakdown(self, n: int) -> int:
        """``(n - 1) // 2``: the median of the magnitudes."""
        return (n - 1) // 2

    def _aggregate(self, updates: NDArray[np.float32], weights: Weights) -> Vector:
        n, d = updates.shape
        magnitudes, out = np.zeros(n), np.empty(d, np.float32)
        width = max(1, BLOCK_VALUES // n)
        for start in range(0, d, width):
            block = updates[:, start : start + width]
            out[start : start + width] = np.sign(np.sign(block).sum(axis=0))
            magnitudes += np.abs(block).sum(axis=1, dtype=np.float64)
        out *= np.float32(np.median(magnitudes) / max(d, 1) if self.step is None else self.step)
        return out
