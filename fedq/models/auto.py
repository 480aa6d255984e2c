"""The zoo's default model for the kind of data at hand."""

from __future__ import annotations

from torch import nn

from fedq.models.base import Model
from fedq.models.imu_cnn import ImuCnn
from fedq.models.mlp import Mlp
from fedq.models.small_cnn import SmallCnn
from fedq.registry import register


@register("model", "auto")
class Auto(Model):
    """``small_cnn`` for images, ``imu_cnn`` for series, ``mlp`` for features and tiny inputs.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> [count_parameters(create(Auto(), shape, 10)) for shape in [(1, 28, 28), (6, 128), (64,)]]
      [55338, 32490, 4810]
    """

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network that fits the shape; images and series below 8 are flattened."""
        large = min(input_shape[1:], default=0) >= 8
        model: Model = Mlp()
        if large and len(input_shape) == 3:
            model = SmallCnn()
        elif large and len(input_shape) == 2:
            model = ImuCnn()
        return model.build(input_shape, classes)
