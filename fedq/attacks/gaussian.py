"""Gaussian noise in place of an update, Blanchard et al. 2017, https://arxiv.org/abs/1703.02757."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedq.attacks.base import Rows, VectorAttack
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "gaussian")
class Gaussian(VectorAttack):
    """Send noise: ``scale`` times as long as the own update (Blanchard et al. 2017, section 6).

    Args:
      fraction: Of clients that are hostile.
      scale: Expected norm of the noise, of the own update's.

    Reference:
      Blanchard et al. 2017, "Machine learning with adversaries".
    """

    strength: ClassVar[str] = "scale"
    fraction: float = 0.2
    scale: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ConfigError(f"attack.scale must be positive, not {self.scale}")

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        deviation = self.scale * np.sqrt(np.square(own).mean(axis=1, keepdims=True))
        return np.asarray(deviation * rng.standard_normal(own.shape))
