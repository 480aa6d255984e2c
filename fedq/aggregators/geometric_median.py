"""Geometric median, Pillutla et al. 2022, https://arxiv.org/abs/1912.13445."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import Blockwise, Products, indicator
from fedq.errors import ConfigError
from fedq.registry import register


@register("aggregator", "geometric_median")
class GeometricMedian(Blockwise):
    """Minimise the sum of distances to the updates, by the smoothed Weiszfeld iteration (RFA).

    ``v <- sum_i c_i u_i`` with ``c_i`` in proportion to ``1 / max(nu, |u_i - v|)``; nu is
    ``smoothing`` times the median distance to the start, a robust centre. It ends when v moves by
    less than ``tolerance`` times that distance, or after ``iterations``. Where an update is itself
    the minimum, which the iteration nears too slowly, Kuhn's criterion finds it first. Weights are
    ignored. Less than half of the updates may be hostile. Cost: O(n**2 d + n**3).

    Args:
      smoothing: Of the median distance; the objective changes by at most nu per update.
      tolerance: Of the median distance.
      iterations: At most.

    Example:
      >>> updates = np.array([[0, 0], [0, 2], [2, 0], [2, 2], [99, 1]], np.float32)
      >>> GeometricMedian()(updates, np.ones(5)).round(3)
      array([1.624, 1.   ], dtype=float32)

    Reference:
      Pillutla et al. 2022, "Robust aggregation for federated learning", Algorithm 2; Kuhn 1973, "A
      note on Fermat's problem".
    """

    smoothing: float = 1e-6
    tolerance: float = 1e-9
    iterations: int = 10_000

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("smoothing", "tolerance"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"aggregator.{name} must lie in (0, 1), not {getattr(self, name)}"
                )
        if self.iterations < 1:
            raise ConfigError(f"aggregator.iterations must be at least 1, not {self.iterations}")

    def breakdown(self, n: int) -> int:
        """``(n - 1) // 2``: any minority."""
        return (n - 1) // 2

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        if (at := _minimal_update(products)) is not None:
            return indicator(np.array([at]), products.n)[None]
        coefficients = products.central()
        unit = float(np.median(products.distances_to(coefficients)))
        for _ in range(self.iterations):
            near = 1 / np.maximum(products.distances_to(coefficients), self.smoothing * unit)
            change = near / near.sum() - coefficients
            coefficients = coefficients + change
            if change @ products.gram @ change <= (self.tolerance * unit) ** 2:
                break
        return coefficients[None]


def _minimal_update(products: Products) -> int | None:
    """Return an update at which the sum of distances is smallest, None if there is none.

    The unit vectors from it to the others sum to less than the number of updates that equal it.
    """
    distances = np.sqrt(products.distances)
    inverse = np.where(distances > 0, 1 / np.where(distances > 0, distances, 1.0), 0.0)
    directions = inverse - np.diag(inverse.sum(axis=1))
    pull = np.sqrt(np.maximum(np.einsum("ki,ki->k", directions @ products.gram, directions), 0))
    slack = (distances == 0).sum(axis=1) * (1 - 1e-9) - pull
    best = int(np.argmax(slack))
    return best if slack[best] > 0 else None
