"""Multi-Krum, Blanchard et al. 2017, https://arxiv.org/abs/1703.02757."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import Products, Selecting, indicator
from fedq.aggregators.krum import ranked
from fedq.registry import register


@register("aggregator", "multi_krum")
class MultiKrum(Selecting):
    """Average the ``n - f`` updates with the lowest Krum scores (Blanchard et al. 2017, section 5).

    Less noise than Krum, which keeps one. Weights are ignored. Needs ``n >= 2 f + 3``.
    Cost: O(n**2 d).

    Args:
      f: Hostile updates to survive: a count (int), or a fraction of the updates (float).

    Example:
      >>> updates = np.array([[1.0], [2.0], [3.0], [4.0], [9e9]], np.float32)
      >>> MultiKrum(f=1)(updates, np.ones(5))
      array([2.5], dtype=float32)

    Reference:
      Blanchard et al. 2017, "Machine learning with adversaries: Byzantine tolerant gradient
      descent", section 5.
    """

    f: int | float = 0.2

    least: ClassVar[tuple[int, int]] = (2, 3)
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"f": 0.1}, {"f": 0})

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        n, f = products.n, self._hostile(products.n)
        chosen = ranked(products.distances, f)[: n - f]
        return indicator(chosen, n)[None] / (n - f)
