"""The configured codec, for everyone and always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedq.budgets.base import Budget, Candidate, History
from fedq.codecs.base import Codec
from fedq.registry import register


@register("budget", "fixed")
class Fixed(Budget):
    """Every client has the configured codec in every round; nothing is remembered."""

    fixed: ClassVar[bool] = True

    def factors(
        self, history: History, cohort: Sequence[Candidate], bits: float, size: int
    ) -> list[float]:
        """Return ones."""
        return [1.0] * len(cohort)

    def after(self, history: History, loss: float | None, examples: Mapping[int, int]) -> History:
        """Return the history as it is."""
        return history

    def codecs(
        self, codec: Codec, history: History, cohort: Sequence[Candidate], size: int
    ) -> list[Codec]:
        """Return the configured codec; any will do."""
        return [codec] * len(cohort)
