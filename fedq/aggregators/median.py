"""Coordinate-wise median, Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators._order import middle_mean
from fedq.aggregators.blockwise import Blockwise
from fedq.layout import Vector
from fedq.registry import register


@register("aggregator", "median")
class Median(Blockwise):
    """Take the median of every coordinate (Yin et al. 2018, Definition 1).

    With an even n, the mean of the two middle values. Weights are ignored: an attacker would claim
    large ones.

    Example:
      >>> Median()(np.array([[1.0], [2.0], [1e9]], np.float32), np.ones(3))
      array([2.], dtype=float32)

    Reference:
      Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal statistical rates".
    """

    keeps_range: ClassVar[bool] = True

    def breakdown(self, n: int) -> int:
        """``(n - 1) // 2``: any minority."""
        return (n - 1) // 2

    def _reduce(self, values: NDArray[np.float32], n: int) -> Vector:
        return middle_mean(values, (n - 1) // 2, n // 2 + 1)
