"""Nearest-neighbour mixing, Allouah et al. 2023, https://arxiv.org/abs/2302.01772."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Aggregator, Weights
from fedq.aggregators.blockwise import Blockwise, Products, Selecting
from fedq.aggregators.trimmed_mean import TrimmedMean
from fedq.layout import Vector
from fedq.registry import register


@register("aggregator", "nearest_neighbour_mixing")
class NearestNeighbourMixing(Selecting):
    """Replace each update by the mean of its nearest neighbours, then apply a robust rule (NNM).

    ``y_i`` is the mean of the ``n - f`` updates nearest to ``u_i``, itself included; ``inner``
    combines the y. With clients of unlike data it brings any standard rule to the optimal order of
    error. Weights are ignored. Needs ``n >= 2 f + 1``. Cost: O(n**2 d), and that of ``inner``.

    Args:
      f: Hostile updates to survive: a count (int), or a fraction of the updates (float).
      inner: The rule over mixed updates.

    Example:
      >>> updates = np.array([[1.0], [2.0], [3.0], [4.0], [9e9]], np.float32)
      >>> NearestNeighbourMixing(f=1)(updates, np.ones(5))
      array([2.5], dtype=float32)

    Reference:
      Allouah et al. 2023, "Fixing by mixing: a recipe for optimal Byzantine ML under
      heterogeneity", Algorithm 2.
    """

    f: int | float = 0.2
    inner: Aggregator = TrimmedMean(trim=0.2)

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"inner": "multi_krum"},
        {"f": 0.4, "inner": "geometric_median"},
        {"f": 0, "inner": "median"},
    )

    def breakdown(self, n: int) -> int:
        """The smaller one of ``f`` and that of ``inner``."""
        return min(super().breakdown(n), self.inner.breakdown(n))

    def check(self, n: int) -> None:
        """Refuse too few updates for ``f``, or for ``inner``."""
        super().check(n)
        self.inner.check(n)

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        n, f = products.n, self._hostile(products.n)
        near = np.argsort(products.distances, axis=1, kind="stable")[:, : n - f]
        mixed = np.zeros((n, n))
        np.put_along_axis(mixed, near, 1 / (n - f), axis=1)
        assert isinstance(self.inner, Blockwise)  # __post_init__ has refused others
        mixing = self.inner._mixing(products.mixed(mixed), np.ones(n))
        return mixed if mixing is None else mixing @ mixed

    def _reduce(self, values: NDArray[np.float32], n: int) -> Vector:
        assert isinstance(self.inner, Blockwise)
        return self.inner._reduce(values, n)
