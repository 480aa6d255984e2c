"""Integers times a scale (Jacob et al. 2018, CVPR, "Quantization and training of neural...")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedq.errors import ConfigError
from fedq.quantization.fake import Grid, WeightQuantizer, straight_through
from fedq.quantization.weights._clips import ClippedWeight
from fedq.quantization.weights.base import WeightScheme, largest_magnitude, positive
from fedq.registry import register

Range = Literal["absmax", "percentile", "mse"]


@register("weight_quantizer", "linear")
class Linear(WeightScheme):
    """``q = clamp(round(w / s))``, ``w^ = s q``; symmetric, or with a zero point.

    Symmetric integers lie in ``[-n, n]``, ``n = 2**(bits-1) - 1``. The narrow range has no
    ``-2**(bits-1)``, so that folding a batch normalisation with a negative gain stays on the grid;
    2 bits are the ternary weights -1, 0, 1. Asymmetric ones take all ``2**bits`` over
    ``[min, max]``, moved so that 0 is a level: ``q = clamp(round(w / s) + z)``. The range follows
    the weight at every step, and no state is kept.

    Args:
      bits: 2 to 8.
      symmetric: Scale alone, or scale and zero point.
      per_channel: One scale per output channel, or one for the layer. Batch normalisation folds
        exactly only with the former.
      range: What the largest integer stands for: the largest magnitude, a percentile of the
        magnitudes, or the clip of least square error among 11 from 0.3 to 1 of the largest.
      percentile: In (50, 100]; with ``range=percentile``.
      rounding: To the nearest level, or up or down at random such that the mean is right, while
        training (Gupta et al. 2015, ICML).
      gradient: Straight through, or zero for clipped weights.

    Example:
      >>> quantizer = Linear(bits=3).quantizer(torch.zeros(1, 4))
      >>> quantizer(torch.tensor([[-3.0, 0.4, 1.0, 2.4]])).tolist()
      [[-3.0, 0.0, 1.0, 2.0]]
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 4, "per_channel": False, "range": "percentile", "gradient": "clipped"},
        {"bits": 4, "range": "mse"},
        {"bits": 2, "range": "mse"},
        {"bits": 5, "symmetric": False},
        {"bits": 2, "symmetric": False, "per_channel": False, "range": "mse"},
        {"bits": 4, "rounding": "stochastic"},
    )

    bits: int = 8
    symmetric: bool = True
    per_channel: bool = True
    range: Range = "absmax"
    percentile: float = 99.9
    rounding: Literal["nearest", "stochastic"] = "nearest"
    gradient: Literal["straight", "clipped"] = "straight"

    def __post_init__(self) -> None:
        self._check_bits()
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile must be in (50, 100], not {self.percentile}")

    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module."""
        return LinearWeight(self)


class LinearWeight(ClippedWeight):
    """The module of :class:`Linear`."""

    def __init__(self, scheme: Linear) -> None:
        super().__init__(scheme.bits, scheme.per_channel, scheme.range == "mse")
        self.scheme = scheme
        self.largest = 2 ** (scheme.bits - 1) - 1
        self.smallest = -self.largest if scheme.symmetric else -self.largest - 1

    def grid(self, weight: Tensor) -> Grid:
        """Return integers, scale and zero point."""
        weight = weight.detach()
        scale, zero = self._fit(weight, self.best(weight) if self.search else 1.0)
        integers = self._codes(weight, scale, zero).nan_to_num_().to(torch.int8)
        return Grid(integers, scale, None if zero is None else zero.nan_to_num().to(torch.int8))

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight."""
        scheme, held = self.scheme, weight.detach()
        scale, zero = self._fit(held, self.share(held))
        stochastic = scheme.rounding == "stochastic" and self.training
        codes = self._codes(held, scale, zero, stochastic)
        values = (codes if zero is None else codes.sub_(zero)).mul_(scale)
        if scheme.gradient == "clipped":
            shift = 0 if zero is None else zero
            low, high = self.smallest - shift - 0.5, self.largest - shift + 0.5
            weight = weight.clamp(low * scale, high * scale)
        return straight_through(weight, values)

    def clipped(self, weight: Tensor, share: Tensor | float) -> Tensor:
        """Return the fake-quantized weight at a share of its range."""
        scale, zero = self._fit(weight, share)
        codes = self._codes(weight, scale, zero)
        return (codes if zero is None else codes.sub_(zero)).mul_(scale)

    def _codes(
        self, weight: Tensor, scale: Tensor, zero: Tensor | None, stochastic: bool = False
    ) -> Tensor:
        codes = weight.div(scale)
        codes = codes.add_(torch.rand_like(codes)).floor_() if stochastic else codes.round_()
        if zero is not None:
            codes.add_(zero)
        elif self.scheme.range == "absmax" and not stochastic:
            return codes  # nothing can be beyond the largest
        return codes.clamp_(self.smallest, self.largest)

    def _fit(self, weight: Tensor, share: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """Return the scale and, if asymmetric, the zero point as whole float32."""
        scheme = self.scheme
        if scheme.symmetric and scheme.range != "percentile":
            high = largest_magnitude(weight, scheme.per_channel)
            return positive(high.mul_(share).div_(self.largest)), None
        rows = weight.flatten(1) if scheme.per_channel else weight.reshape(1, -1)
        shape = [-1, *[1] * (weight.dim() - 1)] if scheme.per_channel else []
        quantile = scheme.percentile / 100
        if scheme.symmetric:
            return positive(
                rows.abs().quantile(quantile, 1).reshape(shape).div_(self.largest)
            ), None
        if scheme.range == "percentile":
            low, high = rows.quantile(1 - quantile, 1), rows.quantile(quantile, 1)
        else:
            low, high = rows.amin(1), rows.amax(1)
        low = low.reshape(shape).clamp(max=0) * share
        high = high.reshape(shape).clamp(min=0) * share
        scale = positive((high - low) / (self.largest - self.smallest))
        return scale, (self.smallest - (low / scale).round_()).clamp_(self.smallest, self.largest)
