"""Powers of two (Miyashita et al. 2016, arXiv:1603.01025; Zhou et al. 2017, ICLR, INQ)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedq.quantization.fake import WeightQuantizer
from fedq.quantization.weights._table import TableWeight
from fedq.quantization.weights.base import WeightScheme
from fedq.registry import register


@register("weight_quantizer", "power_of_two")
class PowerOfTwo(WeightScheme):
    """``w^ = +-s 2**k`` or 0, ``k = 0 ... 2**(bits-1) - 2``: multiplications become shifts.

    Borders lie at arithmetic midpoints, ``1.5 s 2**k``. To round ``log2|w|`` instead would put them
    at the geometric ones, ``1.41 s 2**k``, which is not the nearest level. More than 4 bits add
    only levels next to zero, beyond int8.

    Args:
      bits: 2 to 4.
      per_channel: One scale per output channel, or one for the layer.
      range: The top level is the largest magnitude, or the clip of least square error.

    Example:
      >>> import torch
      >>> quantizer = PowerOfTwo(bits=3, range="absmax").quantizer(torch.zeros(1, 4))
      >>> quantizer(torch.tensor([[-8.0, 5.9, 6.1, 0.9]])).tolist()
      [[-8.0, 4.0, 8.0, 0.0]]
    """

    supported: ClassVar[tuple[int, ...]] = (2, 3, 4)
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 3, "per_channel": False, "range": "absmax"},
    )

    bits: int = 4
    per_channel: bool = True
    range: Literal["absmax", "mse"] = "mse"

    def __post_init__(self) -> None:
        self._check_bits()

    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module."""
        levels = [0, *(2**k for k in range(2 ** (self.bits - 1) - 1))]
        return TableWeight(self.bits, levels, self.per_channel, self.range == "mse")
