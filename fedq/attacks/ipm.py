"""Inner product manipulation, Xie et al. 2020, https://arxiv.org/abs/1903.03936."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedq.attacks.base import Rows, VectorAttack, moments
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "ipm")
class Ipm(VectorAttack):
    """Send ``-epsilon`` times the mean of the honest updates (Xie et al. 2020, section 4).

    A small epsilon passes for an honest update; from ``(n - m) / m`` on, the mean of n updates with
    m hostile ones points backwards.

    Args:
      fraction: Of clients that are hostile.
      epsilon: Length, of the honest mean.

    Reference:
      Xie et al. 2020, "Fall of empires: breaking Byzantine-tolerant SGD by inner product
      manipulation".
    """

    strength: ClassVar[str] = "epsilon"
    fraction: float = 0.2
    epsilon: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise ConfigError(f"attack.epsilon must be positive, not {self.epsilon}")

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        return -self.epsilon * moments(others, own)[0]
