"""A learned clip (Choi et al. 2018, arXiv:1805.06085, "PACT: parameterized clipping...")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedq.errors import ConfigError
from fedq.quantization._kernels import clip_to_grid
from fedq.quantization.activations.base import ActivationScheme
from fedq.quantization.activations.range import Range, RangeActivation
from fedq.quantization.fake import SMALLEST_SCALE, ActivationQuantizer
from fedq.registry import register


@register("activation_quantizer", "pact")
class Pact(ActivationScheme):
    """After a ReLU, ``x^ = s round(clamp(x, 0, alpha) / s)``, ``s = alpha / (2**bits - 1)``.

    The gradient of ``alpha`` is that of the clipped values, plus ``decay alpha``. The first batch
    sets ``alpha`` to its largest value; 0 is unset. Over clients the mean of logarithms is taken.
    Where values may be negative (the input, sums, the logits) the range is tracked as by
    ``range``.

    Args:
      bits: 4 to 8.
      decay: The L2 penalty's factor, which pulls the clip in; not negative.

    Example:
      >>> quantizer = Pact(bits=4).quantizer(rectified=True)
      >>> [round(x, 3) for x in quantizer(torch.tensor([0.0, 0.52, 1.5])).tolist()]
      [0.0, 0.5, 1.5]
    """

    learned: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"bits": 4, "decay": 0.0})

    bits: int = 8
    decay: float = 1e-4

    def __post_init__(self) -> None:
        self._check_bits()
        if not 0 <= self.decay < math.inf:
            raise ConfigError(f"decay must be finite and not negative, not {self.decay}")

    def quantizer(self, rectified: bool) -> ActivationQuantizer:
        """Return the module, unset."""
        return PactActivation(self) if rectified else RangeActivation(Range(bits=self.bits))


class PactActivation(ActivationQuantizer):
    """The module of :class:`Pact`; its state is ``alpha``."""

    merge: ClassVar[Mapping[str, str]] = {"alpha": "log_mean"}

    def __init__(self, scheme: Pact) -> None:
        super().__init__(scheme.bits, rectified=True)
        self.decay = scheme.decay
        self.alpha = nn.Parameter(torch.zeros(()))

    def qparams(self) -> tuple[float, int] | None:
        """Return the scale and the zero point, None while unset."""
        alpha = abs(self.alpha.item())
        if alpha == 0 or not math.isfinite(alpha):
            return None
        scale = float(np.float32(alpha / (self.largest - self.smallest)))
        return max(scale, SMALLEST_SCALE), self.smallest

    def observe(self, x: Tensor) -> None:
        """Set the clip by the first batch."""
        if self.alpha.item() == 0:
            with torch.no_grad():
                self.alpha.fill_(x.amax().clamp(min=0))

    def quantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return ``x`` on the grid, with the gradient of the clip."""
        out: Tensor = _Pact.apply(  # type: ignore[no-untyped-call]
            x, self.alpha, scale, self.largest - self.smallest, self.decay
        )
        return out


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, scale: float, largest: int, decay: float
    ) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.end, ctx.decay = scale * largest, decay
        return clip_to_grid(x, scale, 0, largest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, x, 0.0, ctx.end)
        clipped = torch.ops.aten.threshold_backward(grad, x, ctx.end).sum()
        return inside, clipped * alpha.sgn() + ctx.decay * alpha, None, None, None
