"""Inflated scales: the extreme codes of a codec, at a multiple of its honest step."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedq.attacks.base import Rows, VectorAttack, moments
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "scale_inflation")
class ScaleInflation(VectorAttack):
    """Send the extreme code in every coordinate, against the honest mean, with an inflated scale.

    A payload of few bits has two kinds of content: codes, which the grid bounds, and scales, which
    nothing bounds. ``-factor peak sign(mean)``, with the peak of the own update, is the worst of
    both.

    Args:
      fraction: Of clients that are hostile.
      factor: Of the honest scale.
    """

    strength: ClassVar[str] = "factor"
    fraction: float = 0.2
    factor: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factor > 0:
            raise ConfigError(f"attack.factor must be positive, not {self.factor}")

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        mean, _ = moments(others, own)
        peaks = np.abs(own).max(axis=1, keepdims=True, initial=0)
        return np.asarray(-self.factor * peaks * np.where(mean < 0, -1.0, 1.0))
