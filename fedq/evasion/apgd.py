"""Auto-PGD (Croce & Hein 2020, ICML, arXiv:2003.01690, algorithm 1): step sizes that adapt."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedq.evasion.base import (
    LOSSES,
    Access,
    Backward,
    Ball,
    Evasion,
    Loss,
    Target,
    at_least,
    margin,
    targeted_dlr,
)
from fedq.random import derive
from fedq.registry import register

_MOMENTUM, _ENOUGH = 0.75, 0.75


@register("evasion", "apgd")
class Apgd(Evasion):
    """Untargeted Auto-PGD.

    Args:
      steps: Gradients per restart.
      restarts: Random starts; later ones take up the examples that still hold.
      loss: What to climb.
      backward: How gradients pass quantizers; see :meth:`fedq.evasion.base.Target.climb`.
    """

    access: ClassVar[Access] = "white"
    examples = ({}, {"loss": "dlr", "restarts": 2}, {"backward": "bpda"})
    steps: int = 100
    restarts: int = 1
    loss: Literal["cross_entropy", "dlr"] = "cross_entropy"
    backward: Backward = "ste"

    def __post_init__(self) -> None:
        at_least("apgd", steps=self.steps, restarts=self.restarts)

    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        """Return the points of largest margin that were seen."""
        worst, holds = x.clone(), torch.ones(len(x), dtype=torch.bool)
        for restart in range(self.restarts):
            if not holds.any():
                break
            found, leads = _climb(
                target, x[holds], y[holds], ball, LOSSES[self.loss], self.steps, self.backward,
                derive(seed, "apgd", restart),
            )  # fmt: skip
            worst[holds] = found
            holds[holds.clone()] = leads <= 0
        return worst


@register("evasion", "apgd_targeted")
class ApgdTargeted(Evasion):
    """Auto-PGD towards each of the likeliest wrong classes in turn, by the targeted DLR loss.

    Args:
      steps: Gradients per class.
      classes: Wrong classes to try, the likeliest first.
      backward: How gradients pass quantizers; see :meth:`fedq.evasion.base.Target.climb`.
    """

    access: ClassVar[Access] = "white"
    steps: int = 100
    classes: int = 9
    backward: Backward = "ste"

    def __post_init__(self) -> None:
        at_least("apgd_targeted", steps=self.steps, classes=self.classes)

    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        """Return the points of largest margin that were seen."""
        worst, holds = x.clone(), torch.ones(len(x), dtype=torch.bool)
        logits = target.logits(x).scatter(1, y[:, None], -torch.inf)
        goals = logits.argsort(1, descending=True)
        for number in range(min(self.classes, logits.shape[1] - 1)):
            if not holds.any():
                break
            found, leads = _climb(
                target, x[holds], y[holds], ball, targeted_dlr(goals[holds, number]), self.steps,
                self.backward, derive(seed, "apgd_targeted", number),
            )  # fmt: skip
            worst[holds] = found
            holds[holds.clone()] = leads <= 0
        return worst


def _climb(
    target: Target,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    loss: Loss,
    steps: int,
    backward: Backward,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return the points of largest margin on the way, and their margins."""
    shape = (-1, *[1] * (x.dim() - 1))
    checkpoints = _checkpoints(steps)
    at = ball.start(x, torch.Generator().manual_seed(seed))
    logits, losses, gradient = target.climb(at, y, loss, backward)
    worst, leads = at, margin(logits, y)
    best, best_loss, best_gradient = at, losses, gradient
    size = torch.full((len(x),), 2 * ball.eps)
    before, rises = at, torch.zeros(len(x))
    halved, reference = torch.zeros(len(x), dtype=torch.bool), best_loss
    since = 0
    for step in range(1, steps + 1):
        ahead = ball.project(at + size.reshape(shape) * ball.direction(gradient), x)
        if step > 1:
            pull = at + _MOMENTUM * (ahead - at) + (1 - _MOMENTUM) * (at - before)
            ahead = ball.project(pull, x)
        before, at, last = at, ahead, losses
        if step == steps:  # no gradient is needed after the last step
            logits = target.logits(at)
            losses = loss(logits, y)
        else:
            logits, losses, gradient = target.climb(at, y, loss, backward)
        lead = margin(logits, y)
        wider = (lead > leads).reshape(shape)
        worst, leads = torch.where(wider, at, worst), torch.maximum(lead, leads)
        higher = losses > best_loss
        best = torch.where(higher.reshape(shape), at, best)
        best_gradient = torch.where(higher.reshape(shape), gradient, best_gradient)
        best_loss = torch.maximum(losses, best_loss)
        rises += losses > last
        since += 1
        if step in checkpoints:
            stalled = rises < _ENOUGH * since
            stalled |= ~halved & (best_loss <= reference)
            size = torch.where(stalled, size / 2, size)
            at = torch.where(stalled.reshape(shape), best, at)
            gradient = torch.where(stalled.reshape(shape), best_gradient, gradient)
            halved, reference = stalled, best_loss
            rises, since = torch.zeros(len(x)), 0
    return worst, leads


def _checkpoints(steps: int) -> set[int]:
    """Return the steps after which the step size may be halved (equation 4 of section 3.1)."""
    places, last = [0.0, 0.22], 0.22
    while last < 1:
        last += max(places[-1] - places[-2] - 0.03, 0.06)
        places.append(last)
    return {math.ceil(round(place * steps, 6)) for place in places[1:] if place <= 1}
