"""Training in 8-bit floating point (Wang et al. 2024, "Towards federated learning with...")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedq.quantization.activations.range import Range, RangeActivation
from fedq.quantization.base import Quantization
from fedq.quantization.fake import Grid, WeightQuantizer, straight_through
from fedq.quantization.placement import place
from fedq.quantization.weights.base import largest_magnitude, positive
from fedq.registry import register

Format = Literal["e4m3", "e5m2"]

_TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@register("quantization", "fp8")
class Fp8(Quantization):
    """Weights and activations of all layers in FP8, one scale per tensor, to the nearest level.

    ``w^ = s fp8(w / s)``, with ``s`` such that the largest magnitude is the format's: the tensor's
    at each step for weights, a tracked one for activations. The paper learns these clips. The codec
    ``fp8`` sends models with stochastic rounding. FP8 has no integer form, so such a model cannot
    be exported for int8 kernels.

    Args:
      weights: ``e4m3`` or ``e5m2``.
      activations: The same; None is float.

    Example:
      >>> network = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Flatten())
      >>> _ = network[0].weight.data.copy_(torch.tensor([[448.0, 17.0]]))
      >>> Fp8(activations=None).prepare(network)(torch.eye(2)).flatten().tolist()
      [448.0, 16.0]

    Reference:
      Wang et al. 2024, section 3; Micikevicius et al. 2022, "FP8 formats for deep learning", table
      1.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"weights": "e5m2", "activations": None},
    )

    weights: Format = "e4m3"
    activations: Format | None = "e4m3"

    def prepare(self, model: nn.Module, variant: int = 0) -> nn.Module:
        """Return the network with fake quantizers."""
        form = self.activations
        return place(
            model,
            lambda weight, index, role: Fp8Weight(self.weights),
            (lambda edge, rectified: Fp8Activation(form, rectified)) if form else None,
        )


class Fp8Weight(WeightQuantizer):
    """A weight in FP8 with one scale."""

    def __init__(self, form: Format) -> None:
        super().__init__(bits=8)
        self.form = form

    def grid(self, weight: Tensor) -> Grid:
        """Return the weight in units of the smallest subnormal, int64: these are beyond int8."""
        weight = weight.detach()
        kind = torch.finfo(_TORCH[self.form])
        unit = kind.smallest_normal * kind.eps
        scale = positive(largest_magnitude(weight, per_channel=False) / kind.max)
        integers = rounded(weight / scale, self.form).div_(unit).nan_to_num_().to(torch.int64)
        return Grid(integers, scale * unit)

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight; the gradient is passed straight through."""
        held = weight.detach()
        scale = positive(largest_magnitude(held, False) / torch.finfo(_TORCH[self.form]).max)
        return straight_through(weight, rounded(held / scale, self.form).mul_(scale))


class Fp8Activation(RangeActivation):
    """An activation in FP8 over a tracked range, symmetric; its state is ``lo`` and ``hi``."""

    def __init__(self, form: Format, rectified: bool) -> None:
        super().__init__(Range(symmetric=True), rectified)
        self.form = form
        self.largest = int(torch.finfo(_TORCH[form]).max)
        self.smallest = -self.largest

    def quantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Return ``x`` in FP8; the gradient is zero where it is clipped."""
        low, high = self.codes(zero_point)
        x = x.clamp(low * scale, high * scale)
        return straight_through(x, rounded(x.detach() / scale, self.form).mul_(scale))


def rounded(x: Tensor, form: Format) -> Tensor:
    """Return the nearest FP8 values, ties to even, saturated; a new float32 tensor.

    >>> rounded(torch.tensor([1.0625, 1.0626, -1e9]), "e4m3").tolist()
    [1.0, 1.125, -448.0]
    """
    kind = _TORCH[form]
    top = torch.finfo(kind).max
    return x.clamp(-top, top).to(kind).float()
