"""Label flipping, Biggio et al. 2012, https://arxiv.org/abs/1206.6389."""

from __future__ import annotations

from fedq.attacks.base import Accomplice, Attack, Inputs, Labels
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "label_flip")
class LabelFlip(Attack):
    """Train honestly on wrong labels: class y becomes ``classes - 1 - y`` (Fang et al. 2020).

    Args:
      fraction: Of clients that are hostile.

    Reference:
      Biggio et al. 2012, "Poisoning attacks against support vector machines"; Fang et al. 2020,
      "Local model poisoning attacks to Byzantine-robust federated learning", section 5.1.
    """

    fraction: float = 0.2

    def poison(self, x: Inputs, y: Labels, client: Accomplice) -> tuple[Inputs, Labels]:
        """Return the rows with labels from the other end."""
        if client.classes < 2:
            raise ConfigError("attack=label_flip needs data with classes")
        return x, client.classes - 1 - y
