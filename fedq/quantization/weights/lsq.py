"""Learned step size (Esser et al. 2020, ICLR; initial values of LSQ+: Bhalgat et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedq.quantization.fake import Grid, WeightQuantizer
from fedq.quantization.learned import learned_clip
from fedq.quantization.weights.base import WeightScheme, by_channel, positive
from fedq.quantization.weights.linear import Linear, LinearWeight
from fedq.registry import register


@register("weight_quantizer", "lsq")
class Lsq(WeightScheme):
    """``w^ = s clamp(round(w / s), -n, n)``, ``n = 2**(bits-1) - 1``, with ``s`` learned.

    Gradients: of ``w``, 1 inside and 0 outside; of ``s``, ``round(w / s) - w / s`` inside and
    ``+-n`` outside, times ``1 / sqrt(N n)`` with N the number of weights that share the ``s``. The
    magnitude of ``s`` counts, so that a step across zero does no harm; weight decay does not act on
    it. Over clients the mean of logarithms is taken.

    Args:
      bits: 2 to 8.
      per_channel: One scale per output channel, or one for the layer.
      init: From the weights at hand: ``2 mean|w| / sqrt(n)`` (LSQ), the farther of
        ``mean +- 3 deviations`` over ``2**(bits-1)`` (LSQ+), or least square error.

    Example:
      >>> weight = torch.tensor([[0.9, -1.1, 0.1, 0.0]])
      >>> quantizer = Lsq(bits=2, init="mse").quantizer(weight)
      >>> [name for name, _ in quantizer.named_parameters()]
      ['scale']
    """

    learned: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 2, "per_channel": False, "init": "mean"},
        {"bits": 3, "init": "sigma"},
    )

    bits: int = 4
    per_channel: bool = True
    init: Literal["mean", "sigma", "mse"] = "mse"

    def __post_init__(self) -> None:
        self._check_bits()

    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module, its scale fitted to the weight."""
        return LsqWeight(self, weight)


class LsqWeight(WeightQuantizer):
    """The module of :class:`Lsq`; its state is the scale."""

    merge: ClassVar[Mapping[str, str]] = {"scale": "log_mean"}

    def __init__(self, scheme: Lsq, weight: Tensor) -> None:
        super().__init__(scheme.bits)
        self.largest = 2 ** (scheme.bits - 1) - 1
        sharing = weight.numel() // (len(weight) if scheme.per_channel else 1)
        self.gain = 1 / math.sqrt(sharing * self.largest)
        self.scale = nn.Parameter(_initial(scheme, weight.detach(), self.largest))

    def grid(self, weight: Tensor) -> Grid:
        """Return integers and the learned scale."""
        scale = positive(self.scale.detach().abs())
        codes = (weight.detach() / scale).round_().clamp_(-self.largest, self.largest)
        return Grid(codes.nan_to_num().to(torch.int8), _nan_where(codes, scale))

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight, with the gradient of the scale."""
        return learned_clip(weight, self.scale, -self.largest, self.largest, self.gain)


def _initial(scheme: Lsq, weight: Tensor, largest: int) -> Tensor:
    if scheme.init == "mse":
        fit = Linear(bits=scheme.bits, per_channel=scheme.per_channel, range="mse")
        return LinearWeight(fit).grid(weight).scale.clone()
    rows = weight.flatten(1) if scheme.per_channel else weight.reshape(1, -1)
    if scheme.init == "mean":
        scale = 2 * rows.abs().mean(1) / math.sqrt(largest)
    else:
        mean, spread = rows.mean(1), 3 * rows.std(1, correction=0)
        scale = (mean - spread).abs().maximum((mean + spread).abs()) / (largest + 1)
    scale = positive(scale)
    return by_channel(weight, scale) if scheme.per_channel else scale.reshape(())


def _nan_where(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.where(codes.isnan().any(), torch.nan, scale)
