"""Skellam noise of the clients on codes, Agarwal et al. 2021, arXiv:2110.04995."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from fedq.privacy._distributed import Additive, NoisyCodes
from fedq.privacy._ledger import ORDERS, Rdp
from fedq.privacy._samplers import Table, skellam_table
from fedq.registry import register


@register("privacy", "skellam")
class Skellam(Additive):
    """Each of n clients adds Skellam noise of variance ``(z l2)**2 / n`` to its codes.

    A sum of Skellams is a Skellam, whoever drops out. With n' clients its variance is
    ``mu = n' (z l2)**2 / n``, and its RDP at an integer order alpha at most

        alpha l2**2 / (2 mu)
        + min(((2 alpha - 1) l2**2 + 6 l1) / (4 mu**2), 3 l1 / (2 mu)),
        l1 = min(sqrt(d) l2, l2**2).

    At 16 bits the second line is negligible, and the mechanism costs what the Gaussian costs.

    Example:
      >>> from fedq.privacy.base import Round
      >>> from fedq.registry import build
      >>> privacy = build("privacy", "skellam", noise_multiplier=1.0)
      >>> about = Round(number=1, seed=0, cohort=100, size=131072)
      >>> round(privacy.epsilon_of(privacy.rdp(100, about)), 2)  # a Gaussian's RDP: 4.75
      4.75

    Reference:
      Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated
      learning", corollary 3.6.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"noise_multiplier": 1.0},
        {"epsilon": 4.0, "bits": 14, "clip": 0.1, "seeded": True},
    )

    def noise(self, variance: float) -> Table:
        """Return a client's noise."""
        return skellam_table(variance)

    def additive_rdp(self, codes: NoisyCodes, variance: float, replies: int) -> Rdp:
        """Return the RDP of a sum, from the theorem; a fractional order has that of the next."""
        order, mu = np.ceil(ORDERS), replies * variance
        l2 = codes.l2
        l1 = min(math.sqrt(codes.count) * l2, l2**2)
        excess = np.minimum(((2 * order - 1) * l2**2 + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))
        rdp: Rdp = order * l2**2 / (2 * mu) + excess
        return rdp
