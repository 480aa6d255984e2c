"""A residual network of eight layers (He et al. 2016, CVPR), as in MLPerf Tiny."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.models.norms import Norm, norm_layer
from fedq.registry import register


@register("model", "resnet8")
class ResNet8(Model):
    """A convolution and three residual blocks of ``width``, 2 and 4 times as many channels.

    The image classifier of MLPerf Tiny (Banbury et al. 2021): 77,946 parameters for 32x32 colour
    images and 10 classes.

    Args:
      width: Channels of the first block.
      norm: What follows each convolution; see :mod:`fedq.models.norms`.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> count_parameters(create(ResNet8(), (3, 32, 32), 10))
      77946
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"width": 4},
        {"width": 4, "norm": "group"},
    )

    width: int = 16
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"model.width must be at least 1, not {self.width}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for images (C, H, W) of at least 8x8."""
        self._check(input_shape, dimensions=3, smallest=8)
        width = self.width
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
                norm=norm_layer(self.norm, width, 2),
                relu=nn.ReLU(),
                block1=_Block(width, width, 1, self.norm),
                block2=_Block(width, 2 * width, 2, self.norm),
                block3=_Block(2 * width, 4 * width, 2, self.norm),
                average=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(4 * width, classes),
            )
        )


class _Block(nn.Module):
    """Two convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, width, 2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, width, 2)
        same = stride == 1 and channels == width
        self.skip = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.skip(x))
        return out
