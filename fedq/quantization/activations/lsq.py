"""Learned scales, with and without offset (Esser et al. 2020, ICLR; Bhalgat et al. 2020, CVPRW)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedq.quantization.activations.base import ActivationScheme
from fedq.quantization.activations.range import Range, RangeActivation
from fedq.quantization.fake import SMALLEST_SCALE, ActivationQuantizer
from fedq.quantization.learned import LearnedActivation
from fedq.registry import register


@register("activation_quantizer", "lsq")
class Lsq(ActivationScheme):
    """``x^ = s (clamp(round(x / s) - z, -2**(bits-1), 2**(bits-1) - 1) + z)``, ``s`` learned.

    After a ReLU all integers are positive. The first batch sets ``s = 2 mean|x| / sqrt(n)``, n the
    largest integer; 0 is unset. The gradient of ``s`` is that of
    :class:`~fedq.quantization.weights.lsq.Lsq` with N the values of one example. With an offset the
    first batch sets ``s`` and ``s z`` by least square error, and both are learned. Over clients the
    mean of the logarithms of ``s`` is taken.

    Args:
      bits: 4 to 8.
      offset: LSQ+: learn where the range begins, too, for activations that are not rectified.

    Example:
      >>> quantizer = Lsq(offset=True).quantizer(rectified=False)
      >>> [name for name, _ in quantizer.named_parameters()]
      ['scale', 'offset']
    """

    learned: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"bits": 4, "offset": True},
        {"bits": 5},
    )

    bits: int = 8
    offset: bool = False

    def __post_init__(self) -> None:
        self._check_bits()

    def quantizer(self, rectified: bool) -> ActivationQuantizer:
        """Return the module, unset."""
        return LsqActivation(self, rectified)


class LsqActivation(ActivationQuantizer):
    """The module of :class:`Lsq`; its state is ``scale`` and, if asked, ``offset``."""

    merge: ClassVar[Mapping[str, str]] = {"scale": "log_mean", "offset": "mean"}

    def __init__(self, scheme: Lsq, rectified: bool) -> None:
        super().__init__(scheme.bits, rectified)
        self.first = 0 if rectified else self.smallest  # smallest multiple, without offset
        self.scale = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(())) if scheme.offset and not rectified else None

    def qparams(self) -> tuple[float, int] | None:
        """Return the scale's magnitude and the zero point, None while unset."""
        scale = abs(self.scale.item())
        if scale == 0 or not math.isfinite(scale):
            return None
        scale = max(scale, SMALLEST_SCALE)
        zero_point = self.smallest - self.first
        if self.offset is not None:
            offset = self.offset.item()
            if not math.isfinite(offset):
                return None
            zero_point -= round(offset / scale)
        return scale, min(max(zero_point, self.smallest), self.largest)

    def observe(self, x: Tensor) -> None:
        """Set what is unset by the first batch."""
        if self.scale.item() != 0:
            return
        with torch.no_grad():
            x = x.relu() if self.rectifies else x
            if self.offset is None:
                largest = self.first + self.largest - self.smallest
                self.scale.fill_(2 * x.abs().mean() / math.sqrt(largest))
                return
            fit = RangeActivation(Range(bits=self.bits, tracker="mse"))
            fit.observe(x)
            found = fit.qparams()
            if found is not None:
                scale, zero_point = found
                self.scale.fill_(scale)
                self.offset.fill_(-zero_point * scale)

    def quantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return ``x`` on the grid, with the gradients of what is learned."""
        sharing = max(x[0].numel(), 1)
        gain = 1 / math.sqrt(sharing * (self.first + self.largest - self.smallest))
        codes = self.codes(zero_point)
        shift = self.smallest - self.first - zero_point
        out: Tensor = LearnedActivation.apply(  # type: ignore[no-untyped-call]
            x, self.scale, self.offset, float(np.float32(scale)), codes, shift, gain
        )
        return out
