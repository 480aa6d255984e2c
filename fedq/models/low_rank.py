"""Layers as products of thin ones (Denton et al. 2014, NeurIPS; Jaderberg et al. 2014, BMVC)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fedq.errors import ConfigError
from fedq.models.auto import Auto
from fedq.models.base import Model
from fedq.registry import register


@register("model", "low_rank")
class LowRank(Model):
    """Another model, its dense and convolutional layers factored where that saves parameters.

    A layer of m outputs and n inputs (channels times kernel) becomes one of n to r and one of r to
    m, ``r = share min(m, n)``: a kernel of r channels and a 1x1 convolution, or two dense layers.
    It does so if ``r (m + n) < m n``; the first and the last layer stay. Factors begin as the
    truncated singular value decomposition of the model's own initial weights. Quantizers and codecs
    see ordinary layers.

    Args:
      inner: The model that is factored.
      share: Of the full rank, in (0, 1].

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> [count_parameters(create(m, (1, 28, 28), 10)) for m in (Auto(), LowRank())]
      [55338, 14762]
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"inner": {"name": "small_cnn", "width": 8}},
        {"inner": {"name": "mlp", "hidden": (16, 8)}, "share": 0.1},
    )

    inner: Model = Auto()
    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"model.share must be in (0, 1], not {self.share}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for whatever the inner model takes."""
        network = self.inner.build(input_shape, classes)
        layers = [
            (name, module)
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        ]
        for name, layer in layers[1:-1]:
            factored = self._factored(layer)
            if factored is not None:
                network.set_submodule(name, factored)
        return network

    def _factored(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> nn.Module | None:
        matrix = layer.weight.detach().flatten(1)
        m, n = matrix.shape
        rank = max(1, round(self.share * min(m, n)))
        if rank * (m + n) >= m * n or getattr(layer, "groups", 1) > 1:
            return None
        bias = layer.bias is not None
        thin, wide = _layers(layer, rank, bias)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        root = s[:rank].sqrt()
        with torch.no_grad():
            thin.weight.copy_((root[:, None] * v[:rank]).reshape(thin.weight.shape))
            wide.weight.copy_((u[:, :rank] * root).reshape(wide.weight.shape))
            if bias:
                wide.bias.copy_(layer.bias)
        return nn.Sequential(thin, wide)


def _layers(layer: nn.Linear | nn.Conv1d | nn.Conv2d, rank: int, bias: bool) -> tuple[Any, Any]:
    if isinstance(layer, nn.Linear):
        thin = nn.Linear(layer.in_features, rank, bias=False)
        return thin, nn.Linear(rank, layer.out_features, bias=bias)
    options: dict[str, Any] = {
        key: getattr(layer, key)
        for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    convolution: Any = type(layer)
    thin = convolution(layer.in_channels, rank, bias=False, **options)
    return thin, convolution(rank, layer.out_channels, 1, bias=bias)
