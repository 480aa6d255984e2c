"""Adagrad on the server, FedAdagrad, Reddi et al. 2021, https://arxiv.org/abs/2003.00295."""

from __future__ import annotations

from fedq.optimizers._adaptive import Adaptive
from fedq.optimizers.base import Double
from fedq.registry import register


@register("server_optimizer", "adagrad")
class Adagrad(Adaptive):
    """Take Adagrad steps (FedAdagrad): ``v <- v + u**2``.

    With ``m <- beta_1 m + (1 - beta_1) u``, the model moves by
    ``learning_rate * m / (sqrt(v) + tau)``; v starts at ``tau**2`` and never shrinks.

    Args:
      learning_rate: Server step, the first thing to tune.
      beta_1: Decay of the first moment, in [0, 1); 0, the paper's choice, uses the update alone.
      tau: Degree of adaptivity: larger is closer to plain steps.

    Example:
      >>> import numpy as np
      >>> optimizer, one = Adagrad(learning_rate=0.1), np.ones(1, np.float32)
      >>> weights, state = optimizer.step(np.zeros(1, np.float32), one, optimizer.init(1))
      >>> weights  # 0.1 * 1 / (1 + 0.001)
      array([0.09990005], dtype=float32)

    Reference:
      Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2.
    """

    beta_1: float = 0.0

    def _second_moment(self, v: Double, square: Double) -> Double:
        return v + square
