"""Fake quantizers: float tensors on an integer grid, with straight-through gradients.

Forward, a value becomes what the integer kernel will see; backward, rounding counts as the identity
inside the grid's range and as a constant outside (the clipped straight-through estimator of Bengio
et al. 2013, arXiv:1308.3432, as in Jacob et al. 2018, CVPR). Rounding is half to even, as in ONNX
and TFLite.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: The smallest scale, so that no division overflows: the smallest normal float32.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


class FakeQuantizer(nn.Module, abc.ABC):
    """A module that :func:`fedq.quantization.float_twin` can switch off."""

    #: Off is the identity, which neither observes nor changes any state.
    enabled: bool = True


class WeightQuantizer(FakeQuantizer):
    """A map of a layer's weight, output channels first, to what the device multiplies with.

    Subclasses implement :meth:`quantize`; what they learn is a parameter, what they keep is a
    float32 buffer, both of a shape that is known when they are made.
    """

    @abc.abstractmethod
    def quantize(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight, differentiable."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight, or the weight itself in the float twin."""
        return self.quantize(weight) if self.enabled else weight


class UniformWeight(WeightQuantizer):
    """Symmetric integers in ``[-q, q]``, ``q = 2**(bits-1) - 1``, scaled by the largest weight.

    The narrow range has no ``-2**(bits-1)``, so that folding a batch normalisation with a negative
    gain stays on the grid. As the scale follows the largest weight at every call, nothing is ever
    clipped, no state is kept, and the straight-through gradient is the identity.

    Args:
      bits: 2 to 8; 2 bits are the ternary weights -1, 0, 1.
      per_channel: One scale per output channel, or one for the whole tensor.
    """

    def __init__(self, bits: int, per_channel: bool) -> None:
        super().__init__()
        self.bits = bits
        self.largest = 2 ** (bits - 1) - 1
        self.per_channel = per_channel

    def scale(self, weight: Tensor) -> Tensor:
        """Return the scales, shape (channels, 1, ...) or (), float32 and positive."""
        size = weight.detach().abs()
        if self.per_channel:
            size = size.flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1))
        else:
            size = size.amax()
        return size.div_(self.largest).clamp_min_(SMALLEST_SCALE)

    def integers(self, weight: Tensor) -> Tensor:
        """Return the int8 weight of the deployed layer: ``quantize`` is this times the scale."""
        return (weight.detach() / self.scale(weight)).round_().to(torch.int8)

    def quantize(self, weight: Tensor) -> Tensor:
        """Return ``round(weight / scale) * scale``."""
        out: Tensor = _RoundToGrid.apply(weight, self.scale(weight))  # type: ignore[no-untyped-call]
        return out


class ActivationQuantizer(FakeQuantizer):
    """Asymmetric integers of ``bits`` bits over a range that grows at once and shrinks slowly.

    In training, ``lo`` and ``hi`` take each batch's smallest and largest value where those lie
    outside, and else move towards them by ``momentum``: no value of a training batch is clipped. A
    plain moving average lags while activations grow, and what it clips gets no gradient, which
    holds the first rounds of a federation back. The range always includes 0, which is exactly
    representable: ``scale = (hi - lo) / (2**bits - 1)``,
    ``zero_point = -2**(bits-1) - round(lo / scale)``. While ``lo == hi`` the range is unset and the
    quantizer is the identity.

    Args:
      bits: 2 to 8.
      momentum: How far the range shrinks towards the newest batch's, in (0, 1].
    """

    lo: Tensor
    hi: Tensor

    def __init__(self, bits: int, momentum: float) -> None:
        super().__init__()
        self.bits = bits
        self.momentum = momentum
        self.smallest, self.largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    def qparams(self) -> tuple[float, int] | None:
        """Return the scale (exact in float32) and the zero point, or None while unset."""
        return self._qparams(self.lo.item(), self.hi.item())

    def _qparams(self, lo: float, hi: float) -> tuple[float, int] | None:
        # A diverged range stays visible in the buffers; here it must not become an integer.
        if lo == hi or not math.isfinite(hi - lo):
            return None
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        scale = max(float(np.float32((hi - lo) / (self.largest - self.smallest))), SMALLEST_SCALE)
        zero_point = self.smallest - round(lo / scale)
        return scale, min(max(zero_point, self.smallest), self.largest)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid, having moved the range towards it in training."""
        if not self.enabled:
            return x
        lo_buffer, hi_buffer = self.lo, self.hi
        lo, hi = lo_buffer.item(), hi_buffer.item()
        if self.training:
            values = x.detach()
            low, high = values.amin().item(), values.amax().item()
            momentum = 1.0 if lo == hi else self.momentum
            lo = lo_buffer.fill_(min(low, lo + momentum * (low - lo))).item()  # as float32 keeps it
            hi = hi_buffer.fill_(max(high, hi + momentum * (high - hi))).item()
        qparams = self._qparams(lo, hi)
        if qparams is None:
            return x
        scale, zero_point = qparams
        out: Tensor = _ClipToGrid.apply(  # type: ignore[no-untyped-call]
            x, scale, self.smallest - zero_point, self.largest - zero_point
        )
        return out


class _RoundToGrid(torch.autograd.Function):
    """``round(x / scale) * scale`` with the identity as gradient; ``x`` must be in range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return x.div(scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ClipToGrid(torch.autograd.Function):
    """``clamp(round(x / scale), low, high) * scale``; zero gradient where the clamp binds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
            ctx.range = (low - 0.5) * scale, (high + 0.5) * scale
        return x.div(scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        # One fused pass; a mask from comparisons costs six times as much on a CPU.
        return torch.ops.aten.hardtanh_backward(grad, x, *ctx.range), None, None, None
