"""Centered clipping, Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Weights
from fedq.aggregators.blockwise import Blockwise, Products
from fedq.errors import ConfigError
from fedq.registry import register


@register("aggregator", "centered_clipping")
class CenteredClipping(Blockwise):
    """Average what is clipped about a centre, and repeat (Karimireddy et al. 2021, Algorithm 2).

    ``v <- v + (1/n) sum_i (u_i - v) min(1, tau / |u_i - v|)``. The paper starts from the last
    round's result; this rule holds no state and starts from a robust centre: the mean of the
    ``n // 2 + 1`` updates nearest to one of them. tau is ``multiple`` times the median distance to
    the start, or a fixed ``radius``. Weights are ignored. Less than half of the updates may be
    hostile. Cost: O(n**2 d).

    Args:
      multiple: Of the median distance to the start.
      radius: tau in the units of updates; None takes it from the cohort.
      iterations: Of the update above.

    Example:
      >>> updates = np.array([[1.0], [2.0], [3.0], [9e9]], np.float32)
      >>> bool(CenteredClipping()(updates, np.ones(4))[0] < 3.5)
      True

    Reference:
      Karimireddy et al. 2021, "Learning from history for Byzantine robust optimization".
    """

    multiple: float = 1.0
    radius: float | None = None
    iterations: int = 3

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"multiple": 0.5, "iterations": 5})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.multiple < np.inf:
            raise ConfigError(f"aggregator.multiple must be positive, not {self.multiple}")
        if self.radius is not None and not 0 < self.radius < np.inf:
            raise ConfigError(f"aggregator.radius must be positive or null, not {self.radius}")
        if self.iterations < 1:
            raise ConfigError(f"aggregator.iterations must be at least 1, not {self.iterations}")

    def breakdown(self, n: int) -> int:
        """``(n - 1) // 2``: any minority."""
        return (n - 1) // 2

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        centre = products.central()
        distances = products.distances_to(centre)
        radius = self.multiple * np.median(distances) if self.radius is None else self.radius
        for _ in range(self.iterations):
            factors = np.minimum(1, radius / np.where(distances > 0, distances, np.inf))
            factors[distances <= radius] = 1
            centre = centre + (factors - factors.sum() * centre) / products.n
            distances = products.distances_to(centre)
        return centre[None]
