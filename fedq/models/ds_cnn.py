"""Depthwise separable convolutions for keyword spotting (Zhang et al. 2017, arXiv:1711.07128)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.models.norms import Norm, norm_layer
from fedq.registry import register


@register("model", "ds_cnn")
class DsCnn(Model):
    """A 10x4 convolution of stride 2, depthwise separable 3x3 blocks, and a global average.

    The keyword spotter of MLPerf Tiny (Banbury et al. 2021): 23,180 parameters for 49 frames of 10
    coefficients and 12 words. Inputs are images (C, H, W) or spectrograms (1, frames, bins).

    Args:
      width: Channels of all layers.
      blocks: Depthwise separable blocks.
      norm: What follows each convolution; see :mod:`fedq.models.norms`.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> count_parameters(create(DsCnn(), (1, 49, 10), 12))
      23180
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"width": 8, "blocks": 2},
        {"width": 8, "blocks": 1, "norm": "group"},
    )

    width: int = 64
    blocks: int = 4
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        for option in ("width", "blocks"):
            if getattr(self, option) < 1:
                raise ConfigError(f"model.{option} must be at least 1, not {getattr(self, option)}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for images (C, H, W) of at least 8x8."""
        self._check(input_shape, dimensions=3, smallest=8)
        width = self.width
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            stem=self._layer(input_shape[0], (10, 4), stride=2, padding=(5, 1))
        )
        for i in range(1, self.blocks + 1):
            layers[f"depthwise{i}"] = self._layer(width, (3, 3), padding=(1, 1), groups=width)
            layers[f"pointwise{i}"] = self._layer(width, (1, 1))
        layers["average"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(width, classes)
        return nn.Sequential(layers)

    def _layer(self, channels: int, kernel: tuple[int, int], **options: Any) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, self.width, kernel, bias=False, **options),
                norm=norm_layer(self.norm, self.width, 2),
                relu=nn.ReLU(),
            )
        )
