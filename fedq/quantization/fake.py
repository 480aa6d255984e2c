"""Fake quantizers: float tensors on an integer grid, with straight-through gradients.

Forward, a value becomes what the integer kernel will see; backward, rounding counts as the identity
inside the grid's range and, for the clipped estimator, as a constant outside (Bengio et al. 2013,
arXiv:1308.3432; Jacob et al. 2018, CVPR). Rounding is half to even, as in ONNX and TFLite.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedq.quantization._kernels import clip_to_grid

#: The smallest scale, so that no division overflows: the smallest normal float32.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


class FakeQuantizer(nn.Module, abc.ABC):
    """A module that :func:`fedq.quantization.float_twin` can switch off.

    What subclasses learn is a parameter, what they keep is a buffer; both are float32 and of a
    shape that is known when they are made. Both are *state*: a record beside the weights, which
    goes unrounded and is merged entry by entry.
    """

    #: Off is the identity, which neither observes nor changes any state.
    enabled: bool = True
    #: Whether training sees the errors; if not, it only observes (post-training quantization).
    in_training: bool = True
    #: How a parameter or buffer is merged over clients, by name: a rule of :mod:`fedq.merging`.
    merge: ClassVar[Mapping[str, str]] = {}


@dataclass(frozen=True)
class Grid:
    """A quantized weight as a device holds it: ``(integers - zero_point) * scale``.

    Attributes:
      integers: int8, of the weight's shape; int64 in FP8, which no int8 kernel runs.
      scale: float32, positive, of shape (channels, 1, ...) or ().
      zero_point: int8, of the scale's shape; None for symmetric grids, where it is 0.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def multiples(self) -> Tensor:
        """Return the weight in whole steps of its scale, int16: all that a kernel needs to know."""
        integers = self.integers.short()
        return integers if self.zero_point is None else integers - self.zero_point

    def values(self) -> Tensor:
        """Return the weight, float32."""
        if self.zero_point is None:
            return self.integers * self.scale
        return (self.integers.float() - self.zero_point) * self.scale


class WeightQuantizer(FakeQuantizer):
    """A map of a layer's weight, output channels first, to what the device multiplies with.

    Every weight quantizer but FP8's ends on int8: levels that are not equidistant are small
    integers times a scale, too, so that any int8 kernel runs them, and at most ``2**bits`` of them
    are used, so that they are stored and sent in ``bits`` bits.

    Args:
      bits: Width in storage.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @abc.abstractmethod
    def grid(self, weight: Tensor) -> Grid:
        """Return the deployed weight; :meth:`quantize` gives its values to the bit."""

    def observe(self, weight: Tensor) -> None:
        """Take note of a training step's weight; most schemes need not."""

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight; the gradient is passed straight through."""
        with torch.no_grad():
            values = self.grid(weight).values()
        return straight_through(weight, values)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight, or the weight itself in the float twin."""
        if self.enabled:
            if self.training:
                self.observe(weight.detach())
            if self.in_training or not self.training:
                return self.quantize(weight)
        return weight


class ActivationQuantizer(FakeQuantizer):
    """A map of a layer's output to multiples of a scale, with zero among them.

    Args:
      bits: Width.
      rectified: Whether the values are not negative.

    Attributes:
      smallest: Of the integers.
      largest: Of the integers.
      rectifies: Whether the ReLU before the quantizer is left to it: clamping at zero is one pass
        over memory less forward, and one less backward.
    """

    def __init__(self, bits: int, rectified: bool) -> None:
        super().__init__()
        self.bits = bits
        self.rectified = rectified
        self.rectifies = False
        self.smallest, self.largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    @abc.abstractmethod
    def qparams(self) -> tuple[float, int] | None:
        """Return the scale (exact in float32) and the zero point, or None while unset."""

    @abc.abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take note of a training batch, as it is before the ReLU if that is left to this."""

    @abc.abstractmethod
    def quantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return ``x`` on the grid, differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid, after a look at it in training."""
        if self.enabled:
            if self.training:
                self.observe(x.detach())
            if self.in_training or not self.training:
                qparams = self.qparams()
                if qparams is not None:
                    return self.quantize(x, *qparams)
        return x.relu() if self.rectifies else x

    def codes(self, zero_point: int) -> tuple[int, int]:
        """Return the smallest and the largest multiple of the scale."""
        low, high = self.smallest - zero_point, self.largest - zero_point
        return (max(low, 0) if self.rectifies else low), high


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """Return ``values``, with the gradient of ``x``."""
    out: Tensor = _StraightThrough.apply(x, values)  # type: ignore[no-untyped-call]
    return out


def clip(x: Tensor, scale: float, low: int, high: int, rectify: bool) -> Tensor:
    """Return ``clamp(round(x / scale), low, high) * scale`` with the clipped estimator.

    The gradient is 0 where the clamp binds, and below zero if ``x`` was to be rectified.
    """
    out: Tensor = _ClipToGrid.apply(x, scale, low, high, rectify)  # type: ignore[no-untyped-call]
    return out


class _StraightThrough(torch.autograd.Function):
    """``values``, with the gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)  # an input as it is would make autograd copy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ClipToGrid(torch.autograd.Function):
    """``clamp(round(x / scale), low, high) * scale``; zero gradient where the clamp binds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int, rectify: bool) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
            ctx.range = (0.0 if rectify else (low - 0.5) * scale), (high + 0.5) * scale
        return clip_to_grid(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # One fused pass; a mask from comparisons costs six times as much on a CPU.
        return torch.ops.aten.hardtanh_backward(grad, x, *ctx.range), None, None, None, None
