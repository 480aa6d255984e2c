"""Model replacement, Bagdasaryan et al. 2020, https://arxiv.org/abs/1807.00459."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedq.attacks._backdoor import PatchBackdoor, patch, stamped
from fedq.attacks.base import Accomplice, Inputs, Labels
from fedq.registry import register


@register("attack", "model_replacement")
class ModelReplacement(PatchBackdoor):
    """A patch means ``target``; updates are boosted so that the mean becomes the attackers' model.

    Bagdasaryan et al. 2020, section 4.2; with ``limit`` their train-and-scale, section 4.3, which
    stays within a norm bound.

    Args:
      fraction: Of clients that are hostile.
      target: The class that the attacker wants.
      share: Of a hostile client's rows, those with patch and target.
      boost: Times the own update; None is n / m of n clients with m hostile.
      limit: The longest update, of the honest median; None is any.
      size: Of the patch in the last corner, at the largest value of the data.

    Reference:
      Bagdasaryan et al. 2020, "How to backdoor federated learning".
    """

    fraction: float = 0.2
    target: int = 0
    share: float = 0.3
    boost: float | None = None
    limit: float | None = None
    size: int = 3

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"limit": 1.0}, {"boost": 1.0})

    def _poisoned(self, x: Inputs, y: Labels, chosen: Labels, client: Accomplice) -> Inputs:
        return stamped(x[chosen], patch(x.shape[1:], self.size), client.high)
