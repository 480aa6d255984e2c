"""Fast gradient sign method (Goodfellow et al. 2015, ICLR, arXiv:1412.6572)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedq.evasion.base import Access, Ball, Evasion, Target, cross_entropy
from fedq.registry import register


@register("evasion", "fgsm")
class Fgsm(Evasion):
    """One step to the edge of the ball: an attack to be beaten by, not to defend against."""

    access: ClassVar[Access] = "white"

    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        """Return ``x + eps * direction(gradient)`` in the box."""
        _, _, gradient = target.climb(x, y, cross_entropy)
        return ball.project(x + ball.eps * ball.direction(gradient), x)
