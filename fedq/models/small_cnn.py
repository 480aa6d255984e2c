"""A convolutional network for small images, after LeNet-5 (LeCun et al. 1998, Proc. IEEE 86)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.registry import register

_LARGEST = 7  # height and width of the map that the dense layer sees, at most


@register("model", "small_cnn")
class SmallCnn(Model):
    """Two padded 3x3 convolutions, each halved by max pooling, and two dense layers.

    55,338 parameters for 28x28 grey images and 10 classes. Larger images are averaged to 7x7 before
    the dense layers by overlapping windows of one size (as adaptive pooling, but with an int8
    kernel on every runtime), so that the parameters hardly grow with the image.

    Args:
      width: Channels of the first convolution; the second and the dense layer have twice as many.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> [count_parameters(create(SmallCnn(), (c, n, n), 10)) for c, n in [(1, 28), (3, 96)]]
      [55338, 55626]
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"width": 4})

    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"model.width must be at least 1, not {self.width}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for images (C, H, W) of at least 8x8."""
        self._check(input_shape, dimensions=3, smallest=8)
        channels, *extents = input_shape
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(channels, self.width, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(self.width, 2 * self.width, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
        )
        height, width = (n // 4 for n in extents)
        if max(height, width) > _LARGEST:
            (window_h, step_h), (window_w, step_w) = _window(height), _window(width)
            layers["average"] = nn.AvgPool2d((window_h, window_w), (step_h, step_w))
            height, width = min(height, _LARGEST), min(width, _LARGEST)
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = nn.Linear(2 * self.width * height * width, 2 * self.width)
        layers["relu3"] = nn.ReLU()
        layers["fc2"] = nn.Linear(2 * self.width, classes)
        return nn.Sequential(layers)


def _window(extent: int) -> tuple[int, int]:
    """Return the window and the step that average ``extent`` to exactly 7, or leave it."""
    if extent <= _LARGEST:
        return 1, 1
    step = extent // _LARGEST
    return extent - (_LARGEST - 1) * step, step
