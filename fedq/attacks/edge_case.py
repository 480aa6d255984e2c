"""Edge-case backdoors, Wang et al. 2020, https://arxiv.org/abs/2007.05084."""

from __future__ import annotations

import numpy as np

from fedq.attacks._backdoor import Backdoor
from fedq.attacks.base import Accomplice, Inputs, Labels
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "edge_case")
class EdgeCase(Backdoor):
    """Real inputs of a rare kind are taught as another class; there is no trigger to look for.

    The paper takes them from other data sets (photographs of one airline, digits of one archive).
    Here they are examples of one class mirrored along their last axis, which few honest clients
    hold: their updates do not undo what is taught, and test accuracy does not show it.

    Args:
      fraction: Of clients that are hostile.
      source: The class whose mirrored examples are taught.
      target: The class that the attacker wants.
      share: Of a hostile client's rows, those that are replaced. A client without rows of the
        source poisons none.
      boost: Times the own update; None is n / m of n clients with m hostile.
      limit: The longest update, of the honest median, as in the paper's projected attack; None is
        any.

    Reference:
      Wang et al. 2020, "Attack of the tails: yes, you really can backdoor federated learning".
    """

    fraction: float = 0.2
    source: int = 2
    target: int = 0
    share: float = 0.3
    boost: float | None = 1.0
    limit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source < 0 or self.source == self.target:
            raise ConfigError(
                f"attack.source must be a class other than attack.target, not {self.source}"
            )

    def poison(self, x: Inputs, y: Labels, client: Accomplice) -> tuple[Inputs, Labels]:
        """Return the rows, a share of which became mirrored examples of the source."""
        return super().poison(x, y, client) if (y == self.source).any() else (x, y)

    def _poisoned(self, x: Inputs, y: Labels, chosen: Labels, client: Accomplice) -> Inputs:
        return mirrored(x[np.resize(np.flatnonzero(y == self.source), len(chosen))])

    def probe(self, x: Inputs, y: Labels, classes: int, high: float) -> tuple[Inputs, Labels]:
        """Return the mirrored test examples of the source."""
        chosen = np.flatnonzero(y == self.source)
        if len(chosen) == 0:
            raise ConfigError(f"no test example is of class {self.source}; choose attack.source")
        return mirrored(x[chosen]), self._aimed(chosen, classes)


def mirrored(x: Inputs) -> Inputs:
    """Return (n, ...) inputs reversed along their last axis: left to right, or back in time."""
    return np.ascontiguousarray(x[..., ::-1])
