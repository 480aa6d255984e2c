"""Coordinate-wise trimmed mean, Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators._order import middle_mean
from fedq.aggregators.blockwise import Blockwise
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.registry import register


@register("aggregator", "trimmed_mean")
class TrimmedMean(Blockwise):
    """Average every coordinate without its extremes (Yin et al. 2018, Definition 2).

    Of n values the ``k = floor(trim * n)`` largest and the k smallest are cut, and the other
    ``n - 2 k`` averaged in float64. Weights are ignored: an attacker would claim large ones.

    Args:
      trim: Fraction cut at each end, in [0, 0.5): at least the fraction of hostile clients.

    Example:
      >>> updates = np.array([[-1e9], [1.0], [2.0], [3.0], [1e9]], np.float32)
      >>> TrimmedMean(trim=0.2)(updates, np.ones(5))
      array([2.], dtype=float32)

    Reference:
      Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal statistical rates".
    """

    trim: float = 0.1

    keeps_range: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"trim": 0.0}, {"trim": 0.4})

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ConfigError(
                f"aggregator.trim must lie in [0, 0.5), not {self.trim}: it is cut at each end, "
                "and n > 2 * floor(trim * n) values must remain"
            )

    def breakdown(self, n: int) -> int:
        """``floor(trim * n)``, the values cut at each end."""
        k = math.floor(self.trim * n + 1e-9)  # 0.29 * 100 is 28.999999999999996
        return min(k, (n - 1) // 2)

    def _reduce(self, values: NDArray[np.float32], n: int) -> Vector:
        k = self.breakdown(n)
        return middle_mean(values, k, n - k)
