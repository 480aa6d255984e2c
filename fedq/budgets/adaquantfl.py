"""More levels as the loss falls (Jhunjhunwala et al. 2021, AdaQuantFL)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedq.budgets.base import Budget, Candidate, History
from fedq.registry import register


@register("budget", "adaquantfl")
class AdaQuantFL(Budget):
    """Levels grow with the root of what the loss fell to: ``s_k = s_0 sqrt(F(w_0) / F(w_k))``.

    F is the clients' mean training loss; the codec's levels are ``s_0``, those of the first round.

    Args:
      min_bits: At least.
      max_bits: At most.

    Example:
      >>> history = History(losses=(2.0, 0.5))
      >>> AdaQuantFL().factors(history, [Candidate()], bits=4.0, size=100)
      [2.0]

    Reference:
      Jhunjhunwala et al. 2021, "Adaptive quantization of model updates for communication-efficient
      federated learning", equation 9.
    """

    min_bits: int = 2
    max_bits: int = 8

    def factors(
        self, history: History, cohort: Sequence[Candidate], bits: float, size: int
    ) -> list[float]:
        """Return the same factor for all."""
        losses = history.losses
        factor = 1.0
        if losses and losses[0] > 0:
            factor = math.sqrt(losses[0] / max(losses[-1], 1e-12 * losses[0]))
        return [factor] * len(cohort)
