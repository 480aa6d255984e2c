"""Sign flipping, Li et al. 2019 (RSA), https://arxiv.org/abs/1811.03761."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedq.attacks.base import Rows, VectorAttack
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "sign_flip")
class SignFlip(VectorAttack):
    """Send the opposite of the own update, ``-scale u_i`` (Li et al. 2019, section 5).

    Args:
      fraction: Of clients that are hostile.
      scale: Above 1 it is longer than an honest one.

    Reference:
      Li et al. 2019, "RSA: Byzantine-robust stochastic aggregation methods for distributed learning
      from heterogeneous datasets".
    """

    strength: ClassVar[str] = "scale"
    fraction: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ConfigError(f"attack.scale must be positive, not {self.scale}")

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        return -self.scale * own
