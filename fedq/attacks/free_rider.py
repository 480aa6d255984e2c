"""Free riders, Fraboni et al. 2021, https://arxiv.org/abs/2006.11901."""

from __future__ import annotations

import numpy as np

from fedq.attacks.base import Rows, VectorAttack
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "free_rider")
class FreeRider(VectorAttack):
    """Send no update, disguised by a little noise, to get the model without work or data.

    Args:
      fraction: Of clients that are hostile.
      noise: Norm of the disguise, of an honest update's; 0 is the plain free rider.

    Reference:
      Fraboni et al. 2021, "Free-rider attacks on model aggregation in federated learning",
      section 3.
    """

    fraction: float = 0.2
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise >= 0:
            raise ConfigError(f"attack.noise must not be negative, not {self.noise}")

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        deviation = self.noise * np.sqrt(np.square(own).mean(axis=1, keepdims=True))
        return np.asarray(deviation * rng.standard_normal(own.shape))
