"""Bulyan, El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators._order import mean_near_median
from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import Products, Selecting
from fedq.aggregators.krum import ranked
from fedq.layout import Vector
from fedq.registry import register


@register("aggregator", "bulyan")
class Bulyan(Selecting):
    """Select by repeated Krum, then average near the median (El Mhamdi et al. 2018, section 4).

    Krum picks ``m = n - 2 f`` updates, one at a time and without putting back. Of the m values of a
    coordinate, the ``m - 2 f`` nearest to their median are averaged. Weights are ignored. Needs
    ``n >= 4 f + 3``. Cost: O(n**2 d + n**3 log n).

    Args:
      f: Hostile updates to survive: a count (int), or a fraction of the updates (float).

    Example:
      >>> updates = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [9e9]], np.float32)
      >>> Bulyan(f=1)(updates, np.ones(7))
      array([4.], dtype=float32)

    Reference:
      El Mhamdi et al. 2018, "The hidden vulnerability of distributed learning in Byzantium",
      Algorithm 2.
    """

    f: int | float = 0.1

    least: ClassVar[tuple[int, int]] = (4, 3)
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"f": 0.14}, {"f": 0})

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        n, f = products.n, self._hostile(products.n)
        left, chosen = np.arange(n), []
        for _ in range(n - 2 * f):
            best = ranked(products.distances[np.ix_(left, left)], f)[0]
            chosen.append(left[best])
            left = np.delete(left, best)
        return np.asarray(np.eye(n)[np.sort(chosen)])

    def _reduce(self, values: NDArray[np.float32], n: int) -> Vector:
        return mean_near_median(values, n - 4 * self._hostile(n))
