"""Server momentum, FedAvgM, Hsu et al. 2019, https://arxiv.org/abs/1909.06335."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fedq.optimizers.base import Double, ServerOptimizer, State, check_decay, check_positive
from fedq.registry import register


@register("server_optimizer", "momentum")
class Momentum(ServerOptimizer):
    """Accumulate updates, ``m <- momentum * m + u``, ``w <- w + learning_rate * m`` (Hsu 2019).

    Args:
      learning_rate: Server step; the sum of past updates grows to ``1 / (1 - momentum)`` of them,
        so that less than 1 may be needed.
      momentum: Decay of past updates, in [0, 1); 0 is ``sgd``.

    Example:
      >>> optimizer, one = Momentum(momentum=0.5), np.ones(1, np.float32)
      >>> weights, state = optimizer.step(np.zeros(1, np.float32), one, optimizer.init(1))
      >>> optimizer.step(weights, one, state)
      (array([2.5], dtype=float32), {'momentum': array([1.5], dtype=float32)})

    Reference:
      Hsu et al. 2019, "Measuring the effects of non-identical data distribution for federated
      visual classification", Section 4.3.
    """

    learning_rate: float = 1.0
    momentum: float = 0.9

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"momentum": 0.0})

    def __post_init__(self) -> None:
        check_positive(self.learning_rate, "learning_rate")
        check_decay(self.momentum, "momentum")

    def init(self, d: int) -> State:
        """Return the momentum, zero."""
        return {"momentum": np.zeros(d, np.float32)}

    def _step(
        self, weights: Double, update: Double, state: Mapping[str, Double]
    ) -> tuple[Double, dict[str, Double]]:
        m = self.momentum * state["momentum"] + update
        return weights + self.learning_rate * m, {"momentum": m}
