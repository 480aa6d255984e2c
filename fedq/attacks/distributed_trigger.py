"""Distributed backdoors (DBA), Xie et al. 2020, https://openreview.net/forum?id=rkgyS0VFvr."""

from __future__ import annotations

import numpy as np

from fedq.attacks._backdoor import Mask, PatchBackdoor, patch, stamped
from fedq.attacks.base import Accomplice, Inputs, Labels
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "distributed_trigger")
class DistributedTrigger(PatchBackdoor):
    """Each hostile client teaches a part of the trigger; the whole one is shown to the model.

    No client's data or update looks like the whole (Xie et al. 2020, section 3). With fewer hostile
    clients than parts there are as many parts as clients.

    Args:
      fraction: Of clients that are hostile.
      target: The class that the attacker wants.
      share: Of a hostile client's rows, those with a part of the trigger and the target.
      boost: Times the own update; None is n / m of n clients with m hostile.
      limit: The longest update, of the honest median; None is any.
      size: Of the whole patch in the last corner, at the largest value of the data.
      parts: Of the trigger.

    Reference:
      Xie et al. 2020, "DBA: distributed backdoor attacks against federated learning".
    """

    fraction: float = 0.2
    target: int = 0
    share: float = 0.3
    boost: float | None = 1.0
    limit: float | None = None
    size: int = 4
    parts: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 1:
            raise ConfigError(f"attack.parts must be at least 1, not {self.parts}")

    def part(self, shape: tuple[int, ...], client: Accomplice) -> Mask:
        """Return where a client's part of the trigger is."""
        whole = np.flatnonzero(patch(shape, self.size))
        parts = np.array_split(whole, min(self.parts, client.of))
        mask = np.zeros(shape, np.bool_)
        mask.flat[parts[client.place % len(parts)]] = True
        return mask

    def _poisoned(self, x: Inputs, y: Labels, chosen: Labels, client: Accomplice) -> Inputs:
        return stamped(x[chosen], self.part(x.shape[1:], client), client.high)
