"""FLAME, Nguyen et al. 2022, https://arxiv.org/abs/2101.02281."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import Blockwise, Products
from fedq.registry import register


@register("aggregator", "flame")
class Flame(Blockwise):
    """Keep the tightest cluster of directions, clipped to the median norm (Nguyen et al. 2022).

    Of the single-linkage clusters by ``1 - cos(u_i, u_j)``, the smallest that holds a majority
    (``n // 2 + 1``) is kept: that is what HDBSCAN with the paper's settings (at least ``n / 2 + 1``
    members, one core point) returns. Its members are scaled down to the median norm of all updates
    and averaged. The paper also adds noise; that is left to ``privacy``. Weights are ignored. Less
    than half of the updates may be hostile. Cost: O(n**2 d).

    Example:
      >>> updates = np.array([[1, 0], [2, 0], [1, 0.1], [-1, 9]], np.float32)
      >>> Flame()(updates, np.ones(4)).round(2)
      array([1.17, 0.03], dtype=float32)

    Reference:
      Nguyen et al. 2022, "FLAME: taming backdoors in federated learning", Algorithm 1.
    """

    translates: ClassVar[bool] = False

    def breakdown(self, n: int) -> int:
        """``(n - 1) // 2``: norms are at most the median of all."""
        return (n - 1) // 2

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        norms = products.norms
        safe = np.where(norms > 0, norms, 1.0)
        cosines = products.gram / safe[:, None] / safe
        kept = _majority_cluster(1 - cosines)
        factors = np.minimum(1, np.median(norms) / safe)
        return np.asarray(factors * kept / kept.sum())[None]


def _majority_cluster(distances: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the (n,) members of the smallest single-linkage cluster that holds a majority."""
    n = len(distances)
    cluster = np.arange(n)  # by update
    for _, i, j in sorted(_spanning_tree(distances)):
        cluster[cluster == cluster[j]] = cluster[i]
        members = cluster == cluster[i]
        if members.sum() > n // 2:
            return np.asarray(members)
    return np.ones(n, np.bool_)


def _spanning_tree(distances: NDArray[np.float64]) -> list[tuple[float, int, int]]:
    """Return the edges of a minimum spanning tree (Prim 1957), as (length, i, j)."""
    n = len(distances)
    nearest, length = np.zeros(n, np.intp), distances[0].copy()
    outside = np.ones(n, np.bool_)
    outside[0] = False
    edges = []
    for _ in range(n - 1):
        j = int(np.argmin(np.where(outside, length, np.inf)))
        edges.append((float(length[j]), int(nearest[j]), j))
        outside[j] = False
        closer = distances[j] < length
        nearest[closer], length[closer] = j, distances[j][closer]
    return edges
