"""MoNNA, Farhadkhani et al. 2023, https://arxiv.org/abs/2209.10931."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import check_hostile, combine, enough, hostile, indicator
from fedq.aggregators.trusted import Trusted, products
from fedq.layout import Vector
from fedq.registry import register

_LEAST = (2, 1)


@register("aggregator", "monna")
class MoNNA(Trusted):
    """Average the ``n - f`` updates nearest to a trusted one (Farhadkhani et al. 2023, NNA).

    The paper has no server: each node averages what is nearest to its own vector. Here the node is
    the server, with an update of its own; the momentum in its name is the clients'. Weights are
    ignored. Needs ``n >= 2 f + 1``. Cost: O(n d), and a client's training on the server.

    Args:
      f: Hostile updates to survive: a count (int), or a fraction of the updates (float).
      root_examples: Training examples that the server holds itself.

    Example:
      >>> updates = np.array([[1.0], [2.0], [-9.0]], np.float32)
      >>> MoNNA(f=1)(updates, np.ones(3), reference=np.array([1.0], np.float32))
      array([1.5], dtype=float32)

    Reference:
      Farhadkhani et al. 2023, "Robust collaborative learning with linear gradient overhead".
    """

    f: int | float = 0.2
    root_examples: int = 100

    translates: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"f": 0.4})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hostile(self.f, self.name, _LEAST)

    def breakdown(self, n: int) -> int:
        """``f``: as many honest ones are at least as near."""
        return min(hostile(self.f, n), (n - 1) // 2)

    def check(self, n: int) -> None:
        """Refuse too few updates for ``f``."""
        enough(self.f, n, self.name, _LEAST)

    def _aggregate_beside(
        self, updates: NDArray[np.float32], weights: Weights, reference: Vector
    ) -> Vector:
        n = len(updates)
        kept = n - enough(self.f, n, self.name, _LEAST)
        along, squares = products(updates, reference)
        near = np.argsort(squares - 2 * along, kind="stable")[:kept]  # and |r|**2, for all alike
        return combine(updates, indicator(near, n) / kept)
