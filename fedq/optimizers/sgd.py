"""Plain server step; with rate 1, FedAvg, McMahan et al. 2017, https://arxiv.org/abs/1602.05629."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedq.optimizers.base import Double, ServerOptimizer, check_positive
from fedq.registry import register


@register("server_optimizer", "sgd")
class SGD(ServerOptimizer):
    """Add the update, ``w <- w + learning_rate * u`` (McMahan et al. 2017).

    Args:
      learning_rate: 1 adopts the mean of the clients' models, as FedAvg does.

    Example:
      >>> import numpy as np
      >>> weights, update = np.array([1.0], np.float32), np.array([-0.25], np.float32)
      >>> SGD().step(weights, update, {})
      (array([0.75], dtype=float32), {})

    Reference:
      McMahan et al. 2017, Algorithm 1; Reddi et al. 2021, Algorithm 1 with SGD on the server.
    """

    learning_rate: float = 1.0

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"learning_rate": 0.3})

    def __post_init__(self) -> None:
        check_positive(self.learning_rate, "learning_rate")

    def _step(
        self, weights: Double, update: Double, state: Mapping[str, Double]
    ) -> tuple[Double, dict[str, Double]]:
        return weights + self.learning_rate * update, {}
