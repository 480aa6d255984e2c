"""FLTrust, Cao et al. 2021, https://arxiv.org/abs/2012.13995."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import combine
from fedq.aggregators.trusted import Trusted, products
from fedq.layout import Vector
from fedq.registry import register


@register("aggregator", "fltrust")
class FLTrust(Trusted):
    """Weigh updates by their cosine to a trusted one, at its norm (Cao et al. 2021, section 4).

    With the server's own update r: ``t_i = max(0, cos(u_i, r))`` and
    ``v = sum_i t_i u_i |r| / |u_i| / sum_i t_i``; zero if all are opposed. ``|v| <= |r|`` whatever
    the clients send, so any number of them may be hostile, as long as r points the right way.
    Weights are ignored. Cost: O(n d), and a client's training on the server.

    Args:
      root_examples: Training examples that the server holds itself; the paper has 100.

    Example:
      >>> updates = np.array([[4.0, 0.0], [-9.0, 0.0]], np.float32)
      >>> FLTrust()(updates, np.ones(2), reference=np.array([1.0, 0.0], np.float32))
      array([1., 0.], dtype=float32)

    Reference:
      Cao et al. 2021, "FLTrust: Byzantine-robust federated learning via trust bootstrapping".
    """

    root_examples: int = 100

    translates: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def breakdown(self, n: int) -> int:
        """``n``: the reference bounds the result."""
        return n

    def _aggregate_beside(
        self, updates: NDArray[np.float32], weights: Weights, reference: Vector
    ) -> Vector:
        along, squares = products(updates, reference)
        norms = np.sqrt(squares)
        own = float(np.linalg.norm(reference.astype(np.float64)))
        nonzero = (norms > 0) & (own > 0)
        unit = np.where(nonzero, norms, 1.0)
        trust = np.where(nonzero, np.maximum(along, 0) / unit, 0.0)
        total = trust.sum()
        if total == 0:
            return np.zeros(updates.shape[1], np.float32)
        return combine(updates, trust / total * own / unit)
