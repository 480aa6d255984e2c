"""Ternary weights (Li, Zhang and Liu 2016, arXiv:1605.04711, "Ternary weight networks")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedq.errors import ConfigError
from fedq.quantization.fake import Grid, WeightQuantizer
from fedq.quantization.weights.base import WeightScheme, by_channel, positive
from fedq.registry import register


@register("weight_quantizer", "ternary")
class Ternary(WeightScheme):
    """``w^ = s sign(w)`` where ``|w| > threshold mean|w|``, else 0; ``s`` is the mean of those.

    For a given set of nonzeros that ``s`` has the least square error; 0.7 is near the best
    threshold for normal and for uniform weights (paper, section 2.2).

    Args:
      bits: 2.
      per_channel: One scale per output channel, or one for the layer.
      threshold: In units of the mean magnitude, below 1.

    Example:
      >>> quantizer = Ternary().quantizer(torch.zeros(1, 4))
      >>> quantizer(torch.tensor([[-3.0, 1.0, 0.5, -0.1]])).tolist()
      [[-2.0, 2.0, 0.0, 0.0]]
    """

    supported: ClassVar[tuple[int, ...]] = (2,)
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"per_channel": False})

    bits: int = 2
    per_channel: bool = True
    threshold: float = 0.7

    def __post_init__(self) -> None:
        self._check_bits()
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold must be in [0, 1), not {self.threshold}")

    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module."""
        return TernaryWeight(self)


class TernaryWeight(WeightQuantizer):
    """The module of :class:`Ternary`."""

    def __init__(self, scheme: Ternary) -> None:
        super().__init__(scheme.bits)
        self.scheme = scheme

    def grid(self, weight: Tensor) -> Grid:
        """Return -1, 0 and 1 with their scale."""
        weight = weight.detach()
        rows = weight.flatten(1) if self.scheme.per_channel else weight.reshape(1, -1)
        size = rows.abs()
        large = size > self.scheme.threshold * size.mean(1, keepdim=True)
        scale = (size * large).sum(1) / large.sum(1).clamp_(min=1)
        scale = by_channel(weight, scale) if self.scheme.per_channel else scale.reshape(())
        integers = (rows.sign() * large).reshape(weight.shape).nan_to_num_().to(torch.int8)
        return Grid(integers, positive(scale))
