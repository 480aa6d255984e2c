"""Integers over the range that batches had (Jacob et al. 2018, CVPR, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedq.errors import ConfigError
from fedq.quantization.activations.base import ActivationScheme
from fedq.quantization.fake import SMALLEST_SCALE, ActivationQuantizer, clip
from fedq.registry import register

Tracker = Literal["extremes", "average", "percentile", "mse"]
#: Clips that ``tracker=mse`` tries, as shares of the batch's range.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
#: Values of a batch that percentiles and squares are taken of, at most.
SAMPLE = 4096


@register("activation_quantizer", "range")
class Range(ActivationScheme):
    """``q = clamp(round(x / s) + z)``, ``s = (hi - lo) / (2**bits - 1)``, over a tracked range.

    The range always includes 0, which is exactly representable:
    ``z = -2**(bits-1) - round(lo / s)``. Its state is two float32 buffers, ``lo`` and ``hi``; while
    they are equal it is unset. In training every batch moves them:

    * ``extremes``: to the batch's smallest and largest value where those lie outside, and else
      towards them by ``momentum``: no value of a training batch is clipped. A plain average lags
      while activations grow, and what it clips gets no gradient, which holds the first rounds of a
      federation back.
    * ``average``: towards the batch's extremes by ``momentum``.
    * ``percentile``: towards the batch's ``100 - percentile`` and ``percentile`` by ``momentum``.
    * ``mse``: towards the batch's clip of least square error by ``momentum``.

    Args:
      bits: 4 to 8.
      symmetric: Zero point 0 and ``s = max(-lo, hi) / (2**(bits-1) - 1)``, as TensorRT wants it.
      tracker: How the range follows the batches.
      momentum: In (0, 1].
      percentile: In (50, 100].

    Example:
      >>> quantizer = Range(bits=4).quantizer(rectified=False)
      >>> quantizer(torch.tensor([-0.5, 0.52, 1.0])).tolist()
      [-0.5, 0.5, 1.0]
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 4, "tracker": "mse"},
        {"bits": 5, "tracker": "percentile", "percentile": 99.0},
        {"bits": 6, "symmetric": True, "tracker": "average"},
    )

    bits: int = 8
    symmetric: bool = False
    tracker: Tracker = "extremes"
    momentum: float = 0.05
    percentile: float = 99.9

    def __post_init__(self) -> None:
        self._check_bits()
        if not 0 < self.momentum <= 1:
            raise ConfigError(f"momentum must be in (0, 1], not {self.momentum}")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile must be in (50, 100], not {self.percentile}")

    def quantizer(self, rectified: bool) -> ActivationQuantizer:
        """Return the module."""
        return RangeActivation(self, rectified)


class RangeActivation(ActivationQuantizer):
    """The module of :class:`Range`; its state is ``lo`` and ``hi``."""

    lo: Tensor
    hi: Tensor
    merge: ClassVar[Mapping[str, str]] = {"lo": "mean", "hi": "mean"}

    def __init__(self, scheme: Range, rectified: bool = False) -> None:
        super().__init__(scheme.bits, rectified)
        self.scheme = scheme
        if scheme.symmetric:
            self.smallest = -self.largest
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    def qparams(self) -> tuple[float, int] | None:
        """Return the scale (exact in float32) and the zero point, or None while unset."""
        lo, hi = self.lo.item(), self.hi.item()
        # A diverged range stays visible in the buffers; here it must not become an integer.
        if lo == hi or not math.isfinite(hi - lo):
            return None
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        if self.scheme.symmetric:
            return max(float(np.float32(max(-lo, hi) / self.largest)), SMALLEST_SCALE), 0
        scale = max(float(np.float32((hi - lo) / (self.largest - self.smallest))), SMALLEST_SCALE)
        zero_point = self.smallest - round(lo / scale)
        return scale, min(max(zero_point, self.smallest), self.largest)

    def observe(self, x: Tensor) -> None:
        """Move the range towards a batch's."""
        lo, hi = self.lo.item(), self.hi.item()
        low, high = self._range(x)
        momentum = 1.0 if lo == hi else self.scheme.momentum
        lo, hi = lo + momentum * (low - lo), hi + momentum * (high - hi)
        if self.scheme.tracker == "extremes":
            lo, hi = min(low, lo), max(high, hi)
        self.lo.fill_(lo)
        self.hi.fill_(hi)

    def quantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return ``x`` on the grid."""
        return clip(x, scale, *self.codes(zero_point), self.rectifies)

    def _range(self, x: Tensor) -> tuple[float, float]:
        if self.scheme.tracker in ("extremes", "average"):
            high = x.amax().item()
            if self.rectifies:
                # A value that is not positive in the first example saves a pass over all.
                low = 0.0 if x[0].amin().item() <= 0 else max(x.amin().item(), 0.0)
                return low, max(high, 0.0)
            return x.amin().item(), high
        x = x.flatten()
        x = x[:: -(-len(x) // SAMPLE)]
        if self.rectifies:
            x = x.relu()
        if self.scheme.tracker == "percentile":
            share = self.scheme.percentile / 100
            low, high = x.quantile(1 - share).item(), x.quantile(share).item()
            return low, high
        return _least_square_clip(x, self.largest - self.smallest)


def _least_square_clip(x: Tensor, steps: int) -> tuple[float, float]:
    low, high = min(x.amin().item(), 0.0), max(x.amax().item(), 0.0)
    if low == high or not math.isfinite(high - low):
        return low, high
    errors = []
    for share in CLIPS:
        scale = share * (high - low) / steps
        first = round(share * low / scale)
        error = (x / scale).round_().clamp_(first, first + steps).mul_(scale).sub_(x)
        errors.append(error.square_().sum().item())
    share = CLIPS[int(np.argmin(errors))]
    return share * low, share * high
