"""Norm-bounded mean, Sun et al. 2019, https://arxiv.org/abs/1911.07963."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import Blockwise, Products
from fedq.errors import ConfigError
from fedq.registry import register


@register("aggregator", "norm_bounded")
class NormBounded(Blockwise):
    """Average updates that are scaled down to a bound of their norm (Sun et al. 2019, section 3.3).

    ``sum_i w_i u_i min(1, M / |u_i|) / sum_i w_i`` with ``M = multiple * median_i |u_i|``, or a
    fixed ``bound``. Weights count, so choose a policy for them. Cost: O(n**2 d).

    It bounds what a few clients can do, and does not remove it: f of n move the mean by up to
    ``M f / n``. With less than half of them hostile, M is at most ``multiple`` honest norms.

    Args:
      multiple: Of the cohort's median norm.
      bound: Largest norm; None takes it from the cohort.

    Example:
      >>> NormBounded()(np.array([[1.0], [1.0], [100.0]], np.float32), np.ones(3))
      array([1.], dtype=float32)

    Reference:
      Sun et al. 2019, "Can you really backdoor federated learning?".
    """

    multiple: float = 1.0
    bound: float | None = None

    translates: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"multiple": 2.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.multiple < np.inf:
            raise ConfigError(f"aggregator.multiple must be positive, not {self.multiple}")
        if self.bound is not None and not 0 < self.bound < np.inf:
            raise ConfigError(f"aggregator.bound must be positive or null, not {self.bound}")

    def breakdown(self, n: int) -> int:
        """``(n - 1) // 2``: any minority."""
        return (n - 1) // 2

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        norms = products.norms
        bound = self.multiple * np.median(norms) if self.bound is None else self.bound
        shares = weights / weights.max()
        factors = np.minimum(1, bound / np.where(norms > bound, norms, bound or 1.0))
        return np.asarray(factors * shares / shares.sum())[None]
