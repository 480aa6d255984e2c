"""Discrete Gaussian noise of the clients on codes, Kairouz et al. 2021, arXiv:2102.06387."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from fedq.errors import ConfigError
from fedq.privacy._distributed import Additive, NoisyCodes
from fedq.privacy._ledger import ORDERS, Rdp
from fedq.privacy._samplers import Table, gaussian_table
from fedq.privacy.base import Round
from fedq.registry import register


@register("privacy", "discrete_gaussian")
class DiscreteGaussian(Additive):
    """Each of n clients adds discrete Gaussian noise of variance ``(z l2)**2 / n`` to its codes.

    The sum of n' such clients costs each of them, with ``s**2`` the variance of one,

        e = min(sqrt(l2**2 / (n' s**2) + tau d / 2), l2 / (sqrt(n') s) + tau sqrt(d)),
        tau = 10 sum_(k < n') exp(-2 pi**2 s**2 k / (k + 1)),

    an RDP of ``alpha e**2 / 2``: tau is what the sum of discrete Gaussians is from being one, and
    is negligible from a standard deviation of two steps on.

    Example:
      >>> from fedq.privacy.base import Round
      >>> from fedq.privacy._entropy import Entropy
      >>> from fedq.registry import build
      >>> privacy = build("privacy", "discrete_gaussian", noise_multiplier=0.01)
      >>> encoder = privacy.encoder(Round(number=1, seed=0, cohort=2, size=100))
      >>> x = np.full(100, 0.05, np.float32)
      >>> total = encoder.encode(x, Entropy(1)) + encoder.encode(x, Entropy(2))
      >>> bool(abs(encoder.decode(total, 2) - x).max() < 0.05)
      True

    Reference:
      Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism for federated
      learning with secure aggregation", proposition 14.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"noise_multiplier": 1.0},
        {"noise_multiplier": 0.5, "bits": 12, "clip": 0.1, "seeded": True},
    )

    def encoder(self, about: Round) -> NoisyCodes:
        """Return the round's encoder; the proposition wants half a step of noise per client."""
        codes = super().encoder(about)
        if codes.variance < 0.25:
            raise ConfigError(
                f"{math.sqrt(codes.variance):.2g} steps of discrete Gaussian noise per client do "
                "not add up to one; raise privacy.bits, or choose privacy=skellam, which does"
            )
        return codes

    def noise(self, variance: float) -> Table:
        """Return a client's noise."""
        return gaussian_table(math.sqrt(variance))

    def additive_rdp(self, codes: NoisyCodes, variance: float, replies: int) -> Rdp:
        """Return the RDP of a sum, from the proposition."""
        k = np.arange(1, replies)
        tau = 10 * float(np.exp(-2 * math.pi**2 * variance * k / (k + 1)).sum())
        ratio = codes.l2 / math.sqrt(replies * variance)
        loss = min(
            math.sqrt(ratio**2 + tau * codes.count / 2), ratio + tau * math.sqrt(codes.count)
        )
        rdp: Rdp = ORDERS * loss**2 / 2
        return rdp
