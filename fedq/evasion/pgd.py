"""Projected gradient descent (Madry et al. 2018, ICLR, arXiv:1706.06083)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedq.evasion.base import LOSSES, Access, Backward, Ball, Evasion, Target, at_least, margin
from fedq.random import derive
from fedq.registry import register


@register("evasion", "pgd")
class Pgd(Evasion):
    """Steps of ``2.5 eps / steps`` up the loss from a random start; the worst point seen counts.

    Args:
      steps: Gradients per restart.
      restarts: Random starts; later ones take up the examples that still hold.
      loss: What to climb.
      backward: How gradients pass quantizers; see :meth:`fedq.evasion.base.Target.climb`.
    """

    access: ClassVar[Access] = "white"
    examples = ({}, {"loss": "dlr", "restarts": 2}, {"backward": "bpda"})
    steps: int = 40
    restarts: int = 1
    loss: Literal["cross_entropy", "dlr"] = "cross_entropy"
    backward: Backward = "ste"

    def __post_init__(self) -> None:
        at_least("pgd", steps=self.steps, restarts=self.restarts)

    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        """Return the points of largest margin that were seen."""
        worst, found = x.clone(), torch.full((len(x),), -torch.inf)
        for restart in range(self.restarts):
            holds = found <= 0
            if not holds.any():
                break
            generator = torch.Generator().manual_seed(derive(seed, "pgd", restart))
            own, labels = x[holds], y[holds]
            at = ball.start(own, generator)
            best, most = at, torch.full((len(own),), -torch.inf)
            for step in range(self.steps + 1):
                if step == self.steps:
                    logits = target.logits(at)
                else:
                    logits, _, gradient = target.climb(at, labels, LOSSES[self.loss], self.backward)
                lead = margin(logits, labels)
                better = lead > most
                best, most = _where(better, at, best), torch.maximum(lead, most)
                if step < self.steps:
                    size = 2.5 * ball.eps / self.steps
                    at = ball.project(at + size * ball.direction(gradient), own)
            worst[holds], found[holds] = best, most
        return worst


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *[1] * (a.dim() - 1)), a, b)
