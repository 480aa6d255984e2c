"""Gaussian noise with a clipping bound that follows a quantile, Andrew et al. 2021, 1905.03871."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.privacy._clip import norm
from fedq.privacy._entropy import Entropy
from fedq.privacy.base import Contribution, PrivacyState, Protected, Round
from fedq.privacy.gaussian import Gaussian, noisy_sum
from fedq.registry import register

#: Share of the budget (of 1 / z**2) that goes to the count of unclipped updates.
COUNT_SHARE = 0.1
SMALLEST_CLIP, LARGEST_CLIP = 1e-6, 1e6


@register("privacy", "adaptive_gaussian")
class AdaptiveGaussian(Gaussian):
    """Gaussian noise, with C moved towards the ``quantile`` of the updates' norms.

    Each client says whether its update needed no clipping; with b the noisy share of those,

        C <- C exp(-rate (b - quantile)):

    too many unclipped updates shrink the bound. The bits are centred to +-1/2 and summed with
    noise of their own. Sum and count together cost what a sum with noise multiplier z would: a
    tenth of ``1 / z**2`` goes to the count, the rest to the sum, whose multiplier is
    ``z / sqrt(0.9)``.

    Args:
      clip: C of the first round.
      quantile: Share of updates to leave unclipped, in [0, 1].
      rate: Step of the logarithm of C.

    Example:
      >>> from fedq.registry import build
      >>> round(build("privacy", "adaptive_gaussian", noise_multiplier=1.0).sum_sigma, 3)
      1.054

    Reference:
      Andrew et al. 2021, "Differentially private learning with adaptive clipping", algorithm 1 and
      theorem 1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"noise_multiplier": 1.0},
        {"noise_multiplier": 0.5, "quantile": 0.8, "rate": 0.1, "clip": 0.1},
    )
    asks_within: ClassVar[bool] = True

    quantile: float = 0.5
    rate: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.quantile <= 1:
            raise ConfigError(
                f"privacy.quantile must be in [0, 1], not {self.quantile}; 0.5 is the median"
            )
        if not 0 < self.rate <= 10:
            raise ConfigError(f"privacy.rate must be in (0, 10], not {self.rate}; 0.2 is usual")

    def protect(self, delta: Vector, about: Round, entropy: Entropy) -> Protected:
        """Return the update clipped, and whether it needed no clipping."""
        within = norm(delta) <= self.clip
        return dataclasses.replace(super().protect(delta, about, entropy), within=within)

    @property
    def sum_sigma(self) -> float:
        """The noise multiplier of the sum of updates."""
        return self.sigma / math.sqrt(1 - COUNT_SHARE)

    def after(
        self,
        state: PrivacyState | None,
        accepted: Sequence[Contribution],
        about: Round,
        entropy: Entropy,
    ) -> PrivacyState:
        """Return the state with the release in its ledger and the next round's bound."""
        bits = np.array([sum(0.5 if one.within else -0.5 for one in accepted)])
        sigma = self.sigma / math.sqrt(COUNT_SHARE)
        count = noisy_sum(bits, 0.5, sigma, len(accepted), entropy)
        share = float(count[0]) / about.cohort + 0.5
        factor = math.exp(-self.rate * (share - self.quantile))
        charged = super().after(state, accepted, about, entropy)
        clip = min(max(self.clip * factor, SMALLEST_CLIP), LARGEST_CLIP)
        return dataclasses.replace(charged, clip=clip)
