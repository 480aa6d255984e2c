"""Divide and conquer, Shejwalkar and Houmansadr 2021, https://dx.doi.org/10.14722/ndss.2021.24498."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import Matrix, Products, Selecting, indicator
from fedq.registry import register

_POWER_STEPS = 200


@register("aggregator", "dnc")
class DnC(Selecting):
    """Remove what stands out along the top singular vector (Shejwalkar and Houmansadr 2021).

    The score of an update is its squared projection on the direction in which the centred updates
    vary most; the f highest are removed and the rest averaged. The paper scores once on each of
    several random subsets of coordinates, as an SVD is dear. The Gram matrix has the projections
    of all coordinates, so here updates are removed one at a time, each by a new direction. Weights
    are ignored. Needs ``n >= 2 f + 1``. Cost: O(n**2 d + f n**2).

    Args:
      f: Hostile updates to survive: a count (int), or a fraction of the updates (float).

    Example:
      >>> updates = np.array([[1.0], [2.0], [3.0], [4.0], [90.0]], np.float32)
      >>> DnC(f=1)(updates, np.ones(5))
      array([2.5], dtype=float32)

    Reference:
      Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine: optimizing model poisoning
      attacks and defenses for federated learning", Algorithm 2.
    """

    f: int | float = 0.2

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"f": 0.4}, {"f": 0})

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        n = products.n
        left = np.arange(n)
        for _ in range(self._hostile(n)):
            left = np.delete(left, np.argmax(_scores(products.gram[np.ix_(left, left)])))
        return indicator(left, n)[None] / left.size


def _scores(gram: Matrix) -> NDArray[np.float64]:
    """Return (n,) squared projections on the top direction, up to a factor."""
    centred = gram - gram.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    # Power iteration from the farthest update: where directions tie, any of them will do.
    vector = centred[np.argmax(np.diag(centred))]
    for _ in range(_POWER_STEPS):
        norm = np.linalg.norm(vector)
        if norm == 0:
            break
        before, vector = vector / norm, centred @ (vector / norm)
        if np.abs(vector / max(np.linalg.norm(vector), 1e-300) - before).max() < 1e-9:
            break
    return np.asarray(np.square(vector))
