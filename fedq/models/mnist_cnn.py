"""The two-convolution MNIST network of the PyTorch examples (pytorch/examples, mnist/main.py)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.registry import register


@register("model", "mnist_cnn")
class MnistCnn(Model):
    """Two 3x3 convolutions, one pooling, two dense layers: the classic of MNIST federations.

    1,199,882 parameters for 28x28 grey images and 10 classes; nearly all in the first dense layer.

    Args:
      dropout: Probability of dropping a unit before each dense layer; the original uses 0.25 and
        0.5, federations with few local steps none.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> count_parameters(create(MnistCnn(), (1, 28, 28), 10))
      1199882
    """

    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout must be in [0, 1), not {self.dropout}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for images (C, H, W) of at least 8x8."""
        self._check(input_shape, dimensions=3, smallest=8)
        channels, height, width = input_shape
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 3),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
            relu3=nn.ReLU(),
        )
        if self.dropout:
            layers["dropout"] = nn.Dropout(self.dropout)
        layers["fc2"] = nn.Linear(128, classes)
        return nn.Sequential(layers)
