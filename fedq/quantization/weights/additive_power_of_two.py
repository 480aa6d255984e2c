"""Sums of two powers of two (Li, Dong and Wang 2020, ICLR, "Additive powers-of-two...")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedq.quantization.fake import WeightQuantizer
from fedq.quantization.weights._table import TableWeight
from fedq.quantization.weights.base import WeightScheme
from fedq.registry import register

#: The terms of eq. (5), by width, in units of the smallest: a magnitude is a sum of one of each.
_TERMS: dict[int, tuple[tuple[int, ...], ...]] = {
    3: ((0, 4, 2, 1),),
    4: ((0, 16, 4, 1), (0, 8)),
    5: ((0, 32, 8, 2), (0, 16, 4, 1)),
}


@register("weight_quantizer", "additive_power_of_two")
class AdditivePowerOfTwo(WeightScheme):
    """``w^ = +-s (p_1 + p_2)``, powers of two or 0: dense near zero, and at the ends, too.

    At 4 bits the magnitudes are 0, 1, 4, 8, 9, 12, 16 and 24 times ``s``: two shifts and an
    addition each. The paper learns the clip and normalises weights; here the clip is that of least
    square error and nothing is learned, so that any two clients' weights can be averaged. Beyond 5
    bits the integers are beyond int8.

    Args:
      bits: 3 to 5.
      per_channel: One scale per output channel, or one for the layer.
      range: The top level is the largest magnitude, or the clip of least square error.

    Example:
      >>> import torch
      >>> quantizer = AdditivePowerOfTwo(range="absmax").quantizer(torch.zeros(1, 4))
      >>> quantizer(torch.tensor([[-24.0, 13.0, 6.1, 0.9]])).tolist()
      [[-24.0, 12.0, 8.0, 1.0]]
    """

    supported: ClassVar[tuple[int, ...]] = (3, 4, 5)
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 5, "per_channel": False, "range": "absmax"},
        {"bits": 3},
    )

    bits: int = 4
    per_channel: bool = True
    range: Literal["absmax", "mse"] = "mse"

    def __post_init__(self) -> None:
        self._check_bits()

    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module."""
        levels = [0]
        for terms in _TERMS[self.bits]:
            levels = [level + term for level in levels for term in terms]
        return TableWeight(self.bits, sorted(levels), self.per_channel, self.range == "mse")
