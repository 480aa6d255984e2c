"""No pruning."""

from __future__ import annotations

from typing import ClassVar

from fedq.layout import Layout, Vector
from fedq.pruning.base import Pruning, Structure, Support
from fedq.registry import register


@register("pruning", "none")
class NoPruning(Pruning):
    """All weights are trained."""

    active: ClassVar[bool] = False

    def support(
        self, layout: Layout, structure: Structure, weights: Vector, server_round: int
    ) -> Support | None:
        """Return None."""
        return None
