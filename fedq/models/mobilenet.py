"""MobileNet, depthwise separable throughout (Howard et al. 2017, arXiv:1704.04861)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.models.norms import Norm, norm_layer
from fedq.registry import register

#: Channels at full width and stride of each depthwise separable layer (Howard et al., table 1).
_LAYERS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


@register("model", "mobilenet")
class MobileNet(Model):
    """MobileNetV1: a 3x3 convolution, thirteen depthwise separable ones and a global average.

    At a quarter of its width the person detector of MLPerf Tiny (Banbury et al. 2021): 213,586
    parameters for 96x96 images in colour and 2 classes.

    Args:
      multiplier: Of all channels.
      norm: What follows each convolution; see :mod:`fedq.models.norms`.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> count_parameters(create(MobileNet(), (3, 96, 96), 2))
      213586
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"multiplier": 0.0625},)

    multiplier: float = 0.25
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.multiplier <= 2:
            raise ConfigError(f"model.multiplier must lie in (0, 2], not {self.multiplier}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for images (C, H, W) of at least 8x8."""
        self._check(input_shape, dimensions=3, smallest=8)
        channels = self._width(32)
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            stem=self._layer(input_shape[0], channels, 3, stride=2, padding=1)
        )
        for i, (full, stride) in enumerate(_LAYERS, start=1):
            layers[f"depthwise{i}"] = self._layer(
                channels, channels, 3, stride=stride, padding=1, groups=channels
            )
            wide = self._width(full)
            layers[f"pointwise{i}"] = self._layer(channels, wide, 1)
            channels = wide
        layers["average"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels, classes)
        return nn.Sequential(layers)

    def _width(self, full: int) -> int:
        return max(1, round(self.multiplier * full))

    def _layer(self, before: int, after: int, kernel: int, **options: Any) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(before, after, kernel, bias=False, **options),
                norm=norm_layer(self.norm, after, 2),
                relu=nn.ReLU(),
            )
        )
