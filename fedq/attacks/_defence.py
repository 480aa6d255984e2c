"""The server as colluding attackers simulate it, to try their replies before they send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedq.aggregators.base import Aggregator
from fedq.errors import ConfigError
from fedq.guard import Guard, GuardState, RejectedError, Size
from fedq.layout import Vector

_NO_STATE = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Defence:
    """What the server does with decoded deltas.

    Args:
      aggregator: Its rule.
      guard: What stands before it. Its yardstick follows the rounds before; attackers take this
        round's honest updates for it.
    """

    aggregator: Aggregator
    guard: Guard

    def result(
        self, forged: Sequence[Vector], honest: Sequence[Vector], weights: Sequence[float]
    ) -> Vector | None:
        """Return the aggregate; None if the round fails.

        Args:
          forged: (d,) float32 each, decoded.
          honest: As many honest deltas as are known; at least one. Their mean stands in for an
            update of the server's own.
          weights: Of both, in this order.
        """
        sizes = np.array([[*_sizes(delta), 0.0] for delta in honest])
        median = Size(*np.median(sizes, axis=0).tolist())
        watch = self.guard.watch(GuardState(medians=(median,)), 1, honest[0])
        kept, counted = [], []
        for delta, weight in zip((*forged, *honest), weights, strict=True):
            try:
                kept.append(watch.admit(delta, _NO_STATE))
                counted.append(weight)
            except RejectedError:
                continue
        try:
            mean = np.asarray(np.mean(honest, axis=0, dtype=np.float64), np.float32)
            return self.aggregator(np.array(kept), np.array(counted), mean)
        except ConfigError:
            return None


def _sizes(delta: Vector) -> tuple[float, float]:
    size = Size.of(delta, _NO_STATE)
    return size.norm, size.peak
