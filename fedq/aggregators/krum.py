"""Krum, Blanchard et al. 2017, https://arxiv.org/abs/1703.02757."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import Products, Selecting, indicator
from fedq.registry import register


@register("aggregator", "krum")
class Krum(Selecting):
    """Take the update whose neighbours are nearest (Blanchard et al. 2017, section 4).

    The score of an update is the sum of its squared distances to its ``n - f - 2`` nearest others;
    the lowest score wins. Weights are ignored. Needs ``n >= 2 f + 3``. Cost: O(n**2 d).

    Args:
      f: Hostile updates to survive: a count (int), or a fraction of the updates (float).

    Example:
      >>> updates = np.array([[1.0], [1.1], [1.3], [1.6], [9.0]], np.float32)
      >>> Krum(f=1)(updates, np.ones(5))
      array([1.1], dtype=float32)

    Reference:
      Blanchard et al. 2017, "Machine learning with adversaries: Byzantine tolerant gradient
      descent", Algorithm 1.
    """

    f: int | float = 0.2

    least: ClassVar[tuple[int, int]] = (2, 3)
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"f": 0.1}, {"f": 0})

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        order = ranked(products.distances, self._hostile(products.n))
        return indicator(order[:1], products.n)[None]


def ranked(distances: NDArray[np.float64], f: int) -> NDArray[np.intp]:
    """Return (n,) updates by Krum's score, the best first.

    Ties are common, as two updates may be each other's only neighbour: the sum of all distances
    decides, and not the order of clients.

    Args:
      distances: (n, n) squared distances, zero on the diagonal.
      f: Hostile updates.
    """
    count = max(len(distances) - f - 2, 1)  # n <= 2 happens with f = 0 only
    near = np.sort(distances, axis=1)
    scores = near[:, 1 : 1 + count].sum(axis=1)  # the first is the update itself
    return np.lexsort((near.sum(axis=1), scores))
