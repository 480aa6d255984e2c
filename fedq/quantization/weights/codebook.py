"""A codebook by k-means (Han, Mao and Dally 2016, ICLR, "Deep compression"; Lloyd 1982)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedq.errors import ConfigError
from fedq.quantization.fake import Grid, WeightQuantizer
from fedq.quantization.weights.base import WeightScheme, positive
from fedq.registry import register

_FIRST = 20  # Lloyd's iterations when the module is made
_INT8 = 127


@register("weight_quantizer", "codebook")
class Codebook(WeightScheme):
    """The nearest of ``2**bits`` centroids per layer, which follow the weights by Lloyd's steps.

    A step puts each border midway between two centroids, and each centroid at the mean of its
    weights. Centroids start at quantiles and stay sorted, so that their mean over clients matches
    them by order; latent weights are averaged, never codes. On the device a centroid is the nearest
    multiple of ``max|centroid| / 127``: the layer runs on int8 kernels, and is stored in ``bits``.

    Args:
      bits: 1 to 6.
      every: Training steps between Lloyd's steps, at least 1.

    Example:
      >>> weight = torch.tensor([[1.0, 1.2, -0.1, 0.1]])
      >>> quantizer = Codebook(bits=1).quantizer(weight)
      >>> [round(w, 2) for w in quantizer(weight)[0].tolist()]
      [1.1, 1.1, 0.0, 0.0]
    """

    supported: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6)
    has_zero: ClassVar[bool] = False
    any_width: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"bits": 4, "every": 1})

    bits: int = 2
    every: int = 10

    def __post_init__(self) -> None:
        self._check_bits()
        if self.every < 1:
            raise ConfigError(f"every must be at least 1 step, not {self.every}")

    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module, its codebook fitted to the weight."""
        return CodebookWeight(self, weight)


class CodebookWeight(WeightQuantizer):
    """The module of :class:`Codebook`; its state is the centroids."""

    centroids: Tensor
    steps: Tensor
    merge: ClassVar[Mapping[str, str]] = {"centroids": "mean"}

    def __init__(self, scheme: Codebook, weight: Tensor) -> None:
        super().__init__(scheme.bits)
        self.scheme = scheme
        # An integer buffer, which the trainer sets back for every client.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        weight = weight.detach().flatten()
        places = (torch.arange(2**scheme.bits, device=weight.device) + 0.5) / 2**scheme.bits
        self.register_buffer("centroids", torch.quantile(weight, places).float())
        for _ in range(_FIRST):
            self._lloyd(weight)

    def grid(self, weight: Tensor) -> Grid:
        """Return the centroids' multiples and their scale."""
        weight = weight.detach()
        centroids = self.centroids.sort().values  # a mean over clients is sorted up to rounding
        scale = positive(centroids.abs().amax() / _INT8)
        codes = torch.bucketize(weight.nan_to_num(), (centroids[1:] + centroids[:-1]) / 2)
        integers = (centroids / scale).round_().clamp_(-_INT8, _INT8)
        scale = torch.where(weight.isnan().any(), torch.nan, scale)
        return Grid(integers.nan_to_num_().to(torch.int8)[codes], scale)

    def observe(self, weight: Tensor) -> None:
        """Move the centroids, now and then."""
        if self.steps.item() % self.scheme.every == 0:
            self._lloyd(weight.flatten())
        self.steps += 1

    def _lloyd(self, weight: Tensor) -> None:
        """Move every centroid to the mean of its weights; one without weights stays."""
        centroids = self.centroids.sort().values
        codes = torch.bucketize(weight, (centroids[1:] + centroids[:-1]) / 2)
        codes.clamp_(max=len(centroids) - 1)  # NaN is beyond all
        count = torch.bincount(codes, minlength=len(centroids))
        total = torch.zeros_like(centroids).index_add_(0, codes, weight)
        mean = torch.where(count > 0, total / count.clamp(min=1), centroids)
        self.centroids.copy_(mean.sort().values)
