"""No quantization: the float network, the twin of every comparison."""

from __future__ import annotations

from torch import nn

from fedq.quantization.base import Quantization
from fedq.registry import register


@register("quantization", "none")
class NoQuantization(Quantization):
    """Train and deploy in float32.

    Example:
      >>> network = nn.Linear(4, 2)
      >>> NoQuantization().prepare(network) is network
      True
    """

    def prepare(self, model: nn.Module, variant: int = 0) -> nn.Module:
        """Return the network itself."""
        return model
