"""Grids whose scale, offset or end is trained by the task's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedq.quantization._kernels import clip_to_grid, dot
from fedq.quantization.fake import SMALLEST_SCALE


def learned_clip(weight: Tensor, scale: Tensor, low: int, high: int, gain: float) -> Tensor:
    """Return ``clamp(round(x / s), low, high) s``, ``s = |scale|``, differentiable in both.

    The gradient of ``x`` is 0 outside; that of ``s`` is ``round(v) - v`` inside, ``low`` and
    ``high`` outside, ``v = x / s``, times ``gain`` (Esser et al. 2020, eq. 3 and section 2.2).

    Args:
      weight: float32, output channels first.
      scale: Of shape (channels, 1, ...) or ().
      low: Smallest integer.
      high: Largest integer.
      gain: Factor of the scale's gradient alone.
    """
    out: Tensor = _LearnedWeight.apply(  # type: ignore[no-untyped-call]
        weight, scale, low, high, gain
    )
    return out


class _LearnedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, low: int, high: int, gain: float
    ) -> Tensor:
        size = scale.abs().clamp_min_(SMALLEST_SCALE)
        steps = weight / size
        codes = steps.round().clamp_(low, high)
        ctx.save_for_backward(steps, codes, scale)
        ctx.low, ctx.high, ctx.gain = low, high, gain
        return codes * size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps, codes, scale = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, steps, ctx.low, ctx.high)
        errors = (grad * codes).sub_(inside * steps)
        total = errors.flatten(1).sum(1).reshape(scale.shape) if scale.dim() else errors.sum()
        return inside, total.mul_(scale.sgn()).mul_(ctx.gain), None, None, None


class LearnedActivation(torch.autograd.Function):
    """``clamp(round(x / s), low + z, high + z) s``, differentiable in ``x``, ``s`` and ``s z``.

    Gradients outside the range: 0 of ``x``, ``low`` or ``high`` of ``s``, and 1 of the offset
    ``s z``; inside: 1, ``round(v) - v`` with ``v = x / s``, and 0 (LSQ+, eq. 5 and 6).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        size: float,
        codes: tuple[int, int],
        shift: int,
        gain: float,
    ) -> Tensor:
        """Return the values; ``size`` is ``|scale|``, ``codes`` the ends, ``shift`` their z."""
        out = clip_to_grid(x, size, *codes)
        ctx.save_for_backward(x, out, scale)
        ctx.size, ctx.codes, ctx.shift, ctx.gain = size, codes, shift, gain
        ctx.has_offset = offset is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, in four passes over memory."""
        x, out, scale = ctx.saved_tensors
        low, high = ctx.codes
        inside = torch.ops.aten.hardtanh_backward(grad, x, low * ctx.size, high * ctx.size)
        total = (dot(grad, out) - dot(inside, x)) / ctx.size
        of_offset = None
        if ctx.has_offset:
            outside = grad.sum() - inside.sum()
            total = total - ctx.shift * outside
            of_offset = outside * ctx.gain
        return inside, total * scale.sgn() * ctx.gain, of_offset, None, None, None, None
