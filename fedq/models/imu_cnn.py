"""A 1-D convolutional network for sensor series, after FCN (Wang, Yan and Oates 2017, IJCNN)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.registry import register


@register("model", "imu_cnn")
class ImuCnn(Model):
    """Three convolutions over time, the first two of stride 2, and a global average.

    32,230 parameters for 6 channels (accelerometer and gyroscope) and 6 classes, for any length of
    the series: the average over time leaves ``2 width`` features. Without FCN's batch
    normalisation, whose statistics do not average well over clients of different kinds.

    Args:
      width: Channels of the first convolution; the others have twice as many.
      kernel: Length of every kernel, odd, in samples.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> [count_parameters(create(ImuCnn(), (6, length), 6)) for length in (8, 128)]
      [32230, 32230]
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"width": 4, "kernel": 3})

    width: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"model.width must be at least 1, not {self.width}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"model.kernel must be odd and positive, not {self.kernel}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for series (C, T) of at least 8 samples."""
        self._check(input_shape, dimensions=2, smallest=8)
        channels, wide, padding = input_shape[0], 2 * self.width, self.kernel // 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv1d(channels, self.width, self.kernel, stride=2, padding=padding),
            relu1=nn.ReLU(),
            conv2=nn.Conv1d(self.width, wide, self.kernel, stride=2, padding=padding),
            relu2=nn.ReLU(),
            conv3=nn.Conv1d(wide, wide, self.kernel, padding=padding),
            relu3=nn.ReLU(),
            average=nn.AdaptiveAvgPool1d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(wide, classes),
        )
        return nn.Sequential(layers)
