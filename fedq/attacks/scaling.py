"""Model replacement, Bagdasaryan et al. 2020, https://arxiv.org/abs/1807.00459."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedq.attacks.base import Rows, VectorAttack
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "scaling")
class Scaling(VectorAttack):
    """Send the own update many times as long, so that the mean becomes it (model replacement).

    Args:
      fraction: Of clients that are hostile.
      scale: The number of clients in a round replaces the model by one client's.

    Reference:
      Bagdasaryan et al. 2020, "How to backdoor federated learning", section 4.2; here without a
      trigger.
    """

    strength: ClassVar[str] = "scale"
    fraction: float = 0.2
    scale: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ConfigError(f"attack.scale must be positive, not {self.scale}")

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        return self.scale * own
