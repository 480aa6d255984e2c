"""One pass over memory where torch's operators take four: values on a uniform grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedq.jit import COMPILED, jit


@jit(allocates=False)
def _clip_to_grid(x, out, scale, low, high):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        code = np.rint(x[i] / scale)
        code = high if code > high else code  # NaN compares false, and stays
        code = low if code < low else code
        out[i] = code * scale


def clip_to_grid(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """Return ``clamp(round(x / scale), low, high) * scale``, in the memory order of ``x``.

    Both forms give the same bits.

    Args:
      x: float32.
      scale: A positive float32.
      low: Smallest multiple.
      high: Largest multiple.

    Example:
      >>> clip_to_grid(torch.tensor([-9.0, 0.3, 0.5, 0.9]), 0.25, -4, 3).tolist()
      [-1.0, 0.25, 0.5, 0.75]
    """
    flat = _in_memory_order(x) if COMPILED and x.is_cpu else None
    if flat is None:
        return x.div(scale).round_().clamp_(low, high).mul_(scale)
    out = torch.empty_like(x)
    _clip_to_grid(
        flat.numpy(),
        out.as_strided(flat.shape, (1,)).numpy(),
        np.float32(scale),
        np.float32(low),
        np.float32(high),
    )
    return out


def _in_memory_order(x: Tensor) -> Tensor | None:
    """Return a dense tensor as a vector that shares its memory, None if it has gaps."""
    x = x.detach()
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.as_strided((x.numel(),), (1,))
    return None


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products of two tensors of one shape, shape ().

    Example:
      >>> dot(torch.ones(2, 3), torch.ones(2, 3).mul(2)).item()
      12.0
    """
    if a.stride() == b.stride():
        flat_a, flat_b = _in_memory_order(a), _in_memory_order(b)
        if flat_a is not None and flat_b is not None:
            return torch.dot(flat_a, flat_b)
    return (a * b).sum()
