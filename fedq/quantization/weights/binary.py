"""Binary weights (Rastegari et al. 2016, ECCV, "XNOR-Net", section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedq.quantization.fake import Grid, WeightQuantizer
from fedq.quantization.weights.base import WeightScheme, by_channel, positive
from fedq.registry import register


@register("weight_quantizer", "binary")
class Binary(WeightScheme):
    """``w^ = s sign(w)``, ``s = mean|w|``: the least square error of one bit; zero is no level.

    Args:
      bits: 1.
      per_channel: One scale per output channel, or one for the layer.

    Example:
      >>> quantizer = Binary().quantizer(torch.zeros(1, 4))
      >>> quantizer(torch.tensor([[-3.0, 1.0, 0.0, -0.0]])).tolist()
      [[-1.0, 1.0, 1.0, 1.0]]
    """

    supported: ClassVar[tuple[int, ...]] = (1,)
    has_zero: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"per_channel": False})

    bits: int = 1
    per_channel: bool = True

    def __post_init__(self) -> None:
        self._check_bits()

    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module."""
        return BinaryWeight(self)


class BinaryWeight(WeightQuantizer):
    """The module of :class:`Binary`."""

    def __init__(self, scheme: Binary) -> None:
        super().__init__(scheme.bits)
        self.scheme = scheme

    def grid(self, weight: Tensor) -> Grid:
        """Return -1 and 1 with their scale."""
        weight = weight.detach()
        size = weight.abs()
        if self.scheme.per_channel:
            scale = by_channel(weight, size.flatten(1).mean(1))
        else:
            scale = size.mean()
        one = torch.ones((), dtype=torch.int8)
        return Grid(torch.where(weight < 0, -one, one), positive(scale))
