"""Twice the levels when the loss stalls, more for larger clients (Hönig et al. 2022, DAdaQuant)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fedq.budgets.base import Budget, Candidate, History
from fedq.errors import ConfigError
from fedq.registry import register


@register("budget", "dadaquant")
class DAdaQuant(Budget):
    """Doubly adaptive quantization.

    In time: the levels q double once the smoothed loss ``g_t = psi g_{t-1} + (1 - psi) F_t`` is no
    less than ``patience`` rounds before, and at least as many since the last time. By client: with
    weights w_i, the shares of the cohort's examples, ::

        q_i = q sqrt(sum_j w_j^(2/3) / sum_j w_j^2) w_i^(2/3)

    which spends the fewest levels at the variance that equal ones have. A client that has not been
    heard of counts as the mean of the others.

    Args:
      patience: Rounds without progress; the paper's phi.
      smoothing: Of the loss, in [0, 1); the paper's psi.
      by_client: Whether larger clients get more levels.
      min_bits: At least.
      max_bits: At most.

    Example:
      >>> cohort = [Candidate(examples=100), Candidate(examples=100)]
      >>> DAdaQuant().factors(History(level=2.0), cohort, bits=4.0, size=100)
      [2.0, 2.0]

    Reference:
      Hönig et al. 2022, "DAdaQuant: doubly-adaptive quantization for communication-efficient
      federated learning", algorithms 1 and 2.
    """

    patience: int = 5
    smoothing: float = 0.9
    by_client: bool = True
    min_bits: int = 2
    max_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience < 1:
            raise ConfigError(f"budget.patience must be at least 1, not {self.patience}")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"budget.smoothing must be in [0, 1), not {self.smoothing}")

    def factors(
        self, history: History, cohort: Sequence[Candidate], bits: float, size: int
    ) -> list[float]:
        """Return the level of the round, by client."""
        known = [c.examples for c in cohort if c.examples]
        if not self.by_client or not known:
            return [history.level] * len(cohort)
        mean = math.fsum(known) / len(known)
        weights = [c.examples or mean for c in cohort]
        total = math.fsum(w ** (2 / 3) for w in weights)
        squares = math.fsum(w**2 for w in weights)
        scale = history.level * math.sqrt(total / squares)
        return [round(scale * w ** (2 / 3), 9) for w in weights]

    def after(self, history: History, loss: float | None, examples: Mapping[int, int]) -> History:
        """Return the history after a round; its losses are the smoothed ones."""
        if loss is not None and history.losses:
            loss = self.smoothing * history.losses[-1] + (1 - self.smoothing) * loss
        after = super().after(history, loss, examples)
        rounds = len(after.losses)
        if loss is None or rounds - history.changed <= self.patience:
            return after
        if after.losses[-1] < after.losses[-1 - self.patience]:
            return after
        return dataclasses.replace(after, level=2 * history.level, changed=rounds)
