"""A little is enough, Baruch et al. 2019, https://arxiv.org/abs/1902.06156."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np

from fedq.attacks.base import Rows, VectorAttack, moments
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "alie")
class Alie(VectorAttack):
    """Send ``mean - z std`` of the honest updates, per coordinate (Baruch et al. 2019).

    With small z it hides among honest updates and biases robust rules; with large z it is far out
    in every coordinate.

    Args:
      fraction: Of clients that are hostile.
      z: Deviations; None is the paper's largest one that stays within the honest majority,
        ``Phi^-1((n - m - s) / (n - m))`` with ``s = floor(n / 2 + 1) - m``, of n with m attackers.

    Reference:
      Baruch et al. 2019, "A little is enough: circumventing defenses for distributed learning",
      Algorithm 3.
    """

    strength: ClassVar[str] = "z"
    fraction: float = 0.2
    z: float | None = 1.5

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"z": None})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.z is not None and not self.z >= 0:
            raise ConfigError(f"attack.z must not be negative, not {self.z}")

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        mean, deviation = moments(others, own)
        z = _largest(len(own) + len(others), len(own)) if self.z is None else self.z
        return np.asarray(mean - z * deviation)


def _largest(n: int, m: int) -> float:
    """Return the paper's z, from 0; no more than 5 deviations where a majority is bought."""
    honest = n - m
    supporters = n // 2 + 1 - m
    if honest == 0 or supporters <= 0:
        return 5.0
    share = (honest - supporters) / honest
    return max(0.0, NormalDist().inv_cdf(share)) if share > 0 else 0.0
