"""Coordinate-wise median, Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Aggregator, Weights, sorted_blocks
from fedq.layout import Vector
from fedq.registry import register


@register("aggregator", "median")
class Median(Aggregator):
    """Take the median of every coordinate (Yin et al. 2018, Definition 1).

    With an even n, the mean of the two middle values. Weights are ignored: an attacker would claim
    large ones.

    Example:
      >>> Median()(np.array([[1.0], [2.0], [1e9]], np.float32), np.ones(3))
      array([2.], dtype=float32)

    Reference:
      Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal statistical rates".
    """

    def breakdown(self, n: int) -> int:
        """``(n - 1) // 2``: any minority."""
        return (n - 1) // 2

    def _aggregate(self, updates: NDArray[np.float32], weights: Weights) -> Vector:
        n, d = updates.shape
        out = np.empty(d, np.float32)
        for columns, values in sorted_blocks(updates):
            out[columns] = values[:, (n - 1) // 2 : n // 2 + 1].mean(axis=1, dtype=np.float64)
        return out
