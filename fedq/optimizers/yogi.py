"""Yogi on the server, FedYogi, Reddi et al. 2021, https://arxiv.org/abs/2003.00295."""

from __future__ import annotations

import numpy as np

from fedq.optimizers._adaptive import Forgetting
from fedq.optimizers.base import Double
from fedq.registry import register


@register("server_optimizer", "yogi")
class Yogi(Forgetting):
    """Take Yogi steps (FedYogi): ``v <- v - (1 - beta_2) u**2 sign(v - u**2)``.

    The second moment moves by the size of the squared update whatever its own, so that it forgets
    more slowly than Adam's. With ``m <- beta_1 m + (1 - beta_1) u``, the model moves by
    ``learning_rate * m / (sqrt(v) + tau)``; no bias correction, v starts at ``tau**2``.

    Args:
      learning_rate: Server step, the first thing to tune.
      beta_1: Decay of the first moment, in [0, 1).
      beta_2: Decay of the second moment, in [0, 1).
      tau: Degree of adaptivity: larger is closer to momentum.

    Example:
      >>> optimizer, one = Yogi(learning_rate=0.1), np.ones(1, np.float32)
      >>> weights, state = optimizer.step(np.zeros(1, np.float32), one, optimizer.init(1))
      >>> state["second_moment"]  # 1e-6 + 0.01
      array([0.010001], dtype=float32)

    Reference:
      Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2.
    """

    def _second_moment(self, v: Double, square: Double) -> Double:
        return v - (1 - self.beta_2) * square * np.sign(v - square)
