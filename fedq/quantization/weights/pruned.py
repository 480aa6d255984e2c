"""Magnitude pruning before quantization (Han et al. 2015, NeurIPS; Li et al. 2017, ICLR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from fedq.errors import ConfigError
from fedq.quantization.fake import Grid, WeightQuantizer, straight_through
from fedq.quantization.weights.base import WeightScheme
from fedq.quantization.weights.linear import Linear
from fedq.registry import register


@register("weight_quantizer", "pruned")
class Pruned(WeightScheme):
    """The smallest weights of each layer are zero; the inner scheme quantizes the others.

    The mask follows from the weights alone. All clients of a round start from the same weights, so
    they start from one mask; the deployed network has the mask of the averaged weights. The
    gradient is passed straight through to pruned weights, too, so that one that matters comes back
    (Zhu and Gupta 2018 keep masks; Lin et al. 2020, ICLR, DPF, do not).

    Args:
      sparsity: Share of the weights (or channels) of a layer that are zero, in [0, 1).
      unit: Single weights, by magnitude, or output channels, by Euclidean norm.
      inner: Scheme of the weights that are left; one that has zero among its levels.

    Example:
      >>> quantizer = Pruned(sparsity=0.5).quantizer(torch.zeros(1, 4))
      >>> [round(w, 2) for w in quantizer(torch.tensor([[-3.0, 0.4, 1.0, 2.4]]))[0].tolist()]
      [-3.0, 0.0, 0.0, 2.41]
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"sparsity": 0.5, "unit": "channel", "inner": {"name": "linear", "bits": 4}},
        {"sparsity": 0.25, "inner": {"name": "lsq", "bits": 4}},
    )

    sparsity: float = 0.5
    unit: Literal["weight", "channel"] = "weight"
    inner: WeightScheme = Linear()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0, 1), not {self.sparsity}")
        if not self.inner.has_zero:
            raise ConfigError(
                f"pruned weights are zero, which {self.inner.name} cannot represent; choose another"
                " inner scheme, such as linear"
            )

    @property
    def bits(self) -> int:  # type: ignore[override]
        """The inner scheme's."""
        return self.inner.bits

    @property
    def supported(self) -> tuple[int, ...]:  # type: ignore[override]
        """The inner scheme's."""
        return self.inner.supported

    @property
    def learned(self) -> bool:  # type: ignore[override]
        """The inner scheme's."""
        return self.inner.learned

    def at(self, bits: int) -> Self:
        """Return the scheme at another width of the inner one."""
        return type(self)(sparsity=self.sparsity, unit=self.unit, inner=self.inner.at(bits))

    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module."""
        return PrunedWeight(self, weight)


class PrunedWeight(WeightQuantizer):
    """The module of :class:`Pruned`; its state is that of the inner module."""

    def __init__(self, scheme: Pruned, weight: Tensor) -> None:
        super().__init__(scheme.bits)
        self.scheme = scheme
        self.inner = scheme.inner.quantizer(weight)

    def mask(self, weight: Tensor) -> Tensor:
        """Return 1 where a weight is kept and 0 elsewhere, to be broadcast; NaN is kept."""
        if self.scheme.unit == "channel":
            size = weight.detach().flatten(1).square().sum(1)
        else:
            size = weight.detach().abs().flatten()
        zeros = int(self.scheme.sparsity * size.numel())
        keep = torch.ones_like(size)
        keep[size.argsort(stable=True)[:zeros]] = 0
        shape = [-1, *[1] * (weight.dim() - 1)] if self.scheme.unit == "channel" else weight.shape
        return keep.reshape(shape)

    def grid(self, weight: Tensor) -> Grid:
        """Return the inner grid of what is kept."""
        weight = weight.detach()
        return self.inner.grid(weight * self.mask(weight))

    def observe(self, weight: Tensor) -> None:
        """Let the inner scheme observe what is kept."""
        self.inner.observe(weight * self.mask(weight))

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight."""
        kept = straight_through(weight, weight.detach() * self.mask(weight))
        return self.inner.quantize(kept)
