"""AutoAttack (Croce & Hein 2020, ICML, arXiv:2003.01690), by the package ``pyautoattack``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from fedq.errors import ConfigError
from fedq.evasion.base import Access, Ball, Evasion, Target
from fedq.registry import register


@register("evasion", "auto_attack")
class AutoAttack(Evasion):
    """The standard version: APGD-CE, APGD-T, FAB-T and Square, parameters as published."""

    access: ClassVar[Access] = "white"

    def check(self) -> None:
        """Raise :class:`ConfigError` if the package is missing."""
        if find_spec("pyautoattack") is None:
            raise ConfigError("evasion=auto_attack needs pip install 'fedq[robustness]'")

    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        """Return what AutoAttack finds; it works on [0, 1], to which the box is scaled."""
        from pyautoattack import AutoAttack as Package

        low = float(x.min()) - ball.eps if ball.low is None else ball.low
        high = float(x.max()) + ball.eps if ball.high is None else ball.high
        span = high - low
        attack = Package(
            lambda unit: target.network(low + span * unit),
            norm={"linf": "Linf", "l2": "L2"}[ball.norm],
            eps=ball.eps / span,
            seed=seed % 2**32,
            version="standard",
            device="cpu",
        )
        found, _ = attack.run_standard_evaluation((x - low) / span, y, batch_size=250)
        return ball.project(low + span * torch.as_tensor(found), x)
