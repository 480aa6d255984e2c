"""Adam on the server, FedAdam, Reddi et al. 2021, https://arxiv.org/abs/2003.00295."""

from __future__ import annotations

from fedq.optimizers._adaptive import Forgetting
from fedq.optimizers.base import Double
from fedq.registry import register


@register("server_optimizer", "adam")
class Adam(Forgetting):
    """Take Adam steps (FedAdam): ``v <- beta_2 v + (1 - beta_2) u**2``.

    With ``m <- beta_1 m + (1 - beta_1) u``, the model moves by
    ``learning_rate * m / (sqrt(v) + tau)``; no bias correction, v starts at ``tau**2``.

    Args:
      learning_rate: Server step, the first thing to tune.
      beta_1: Decay of the first moment, in [0, 1).
      beta_2: Decay of the second moment, in [0, 1).
      tau: Degree of adaptivity: larger is closer to momentum.

    Example:
      >>> import numpy as np
      >>> optimizer, one = Adam(learning_rate=0.1), np.ones(1, np.float32)
      >>> weights, state = optimizer.step(np.zeros(1, np.float32), one, optimizer.init(1))
      >>> weights  # 0.1 * 0.1 / (sqrt(0.01) + 0.001)
      array([0.09900505], dtype=float32)

    Reference:
      Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2.
    """

    def _second_moment(self, v: Double, square: Double) -> Double:
        return self.beta_2 * v + (1 - self.beta_2) * square
