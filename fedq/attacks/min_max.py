"""Min-max, Shejwalkar and Houmansadr 2021, https://dx.doi.org/10.14722/ndss.2021.24498."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fedq.attacks._optimised import Direction, perturbed
from fedq.attacks.base import Rows, VectorAttack
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "min_max")
class MinMax(VectorAttack):
    """Send the mean, perturbed as far as honest updates lie apart.

    ``mean + gamma p`` with the largest gamma whose distance to any honest update is at most the
    largest distance of two honest ones: it hides from rules that look at distances.

    Args:
      fraction: Of clients that are hostile.
      direction: ``unit`` against the mean, ``std`` along the deviations, ``sign`` of the mean.
      stretch: Times the largest gamma; above 1 it leaves the limit.

    Reference:
      Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine", section IV.
    """

    strength: ClassVar[str] = "stretch"
    fraction: float = 0.2
    direction: Direction = "std"
    stretch: float = 1.0

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"direction": "unit"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stretch >= 0:
            raise ConfigError(f"attack.stretch must not be negative, not {self.stretch}")

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        return perturbed(own, others, self.direction, "max", self.stretch)
