"""Transfer from a network that the attacker has in place of the target's gradients.

Papernot et al. 2017, AsiaCCS, arXiv:1602.02697.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedq.evasion.apgd import Apgd
from fedq.evasion.base import Access, Ball, Evasion, Target
from fedq.registry import register


@register("evasion", "transfer")
class Transfer(Evasion):
    """Attack the float twin, and try what is found on the target.

    Args:
      inner: The attack on the twin.
    """

    access: ClassVar[Access] = "transfer"
    inner: Evasion = Apgd()

    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        """Return what defeats the twin; the inputs themselves if there is none."""
        if target.twin is None:
            return x
        return self.inner(Target(target.twin), x, y, ball, seed)

    def doubled(self) -> None:
        """It converges on another network."""
