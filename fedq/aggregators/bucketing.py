"""Bucketing, Karimireddy et al. 2022, https://arxiv.org/abs/2006.09365."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Aggregator, Weights
from fedq.aggregators.blockwise import Blockwise, Products
from fedq.aggregators.geometric_median import GeometricMedian
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.random import derive
from fedq.registry import register


@register("aggregator", "bucketing")
class Bucketing(Blockwise):
    """Average random buckets of updates, then apply a robust rule (Karimireddy et al. 2022).

    Buckets of ``size`` are less unlike than clients with different data, so that ``inner`` does not
    mistake the rare for the hostile; but one hostile update spoils its bucket, so ``inner`` must
    survive f of ``ceil(n / size)``. The permutation follows from ``seed`` and the updates, so it is
    new in every round, and the order of clients does not matter. Weights are ignored.

    Args:
      size: Updates per bucket; the last may have fewer. 1 is ``inner`` alone.
      inner: The rule over bucket means.
      seed: Keep it on the server: who knows it could choose its bucket.

    Example:
      >>> updates = np.array([[1.0], [2.0], [3.0], [9e9], [2.0], [2.0]], np.float32)
      >>> from fedq.registry import build
      >>> bool(build("aggregator", "bucketing", inner="median")(updates, np.ones(6))[0] < 3)
      True

    Reference:
      Karimireddy et al. 2022, "Byzantine-robust learning on heterogeneous datasets via bucketing",
      Algorithm 1.
    """

    size: int = 2
    inner: Aggregator = GeometricMedian()
    seed: int = 0

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"size": 3, "inner": {"name": "trimmed_mean", "trim": 0.3}},
        {"size": 1, "inner": "multi_krum"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ConfigError(f"aggregator.size must be at least 1, not {self.size}")

    def breakdown(self, n: int) -> int:
        """That of ``inner`` for ``ceil(n / size)``."""
        return self.inner.breakdown(self._buckets(n))

    def check(self, n: int) -> None:
        """Refuse too few buckets for ``inner``."""
        self.inner.check(self._buckets(n))

    def _buckets(self, n: int) -> int:
        return -(-n // self.size)

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        n, count = products.n, self._buckets(products.n)
        keys = [derive(self.seed, f"{norm:.6e}") for norm in products.norms]
        order = np.argsort(keys, kind="stable")
        buckets = np.zeros((count, n))
        buckets[np.arange(n) // self.size, order] = 1
        buckets /= buckets.sum(axis=1, keepdims=True)
        assert isinstance(self.inner, Blockwise)  # __post_init__ has refused others
        mixing = self.inner._mixing(products.mixed(buckets), np.ones(count))
        return buckets if mixing is None else mixing @ buckets

    def _reduce(self, values: NDArray[np.float32], n: int) -> Vector:
        assert isinstance(self.inner, Blockwise)
        return self.inner._reduce(values, self._buckets(n))
