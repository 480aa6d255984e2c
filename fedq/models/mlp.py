"""Dense layers with ReLU between them (Rumelhart, Hinton and Williams 1986, Nature 323)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

from torch import nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.registry import register


@register("model", "mlp")
class Mlp(Model):
    """Dense layers for feature vectors; inputs of any other shape are flattened.

    50,890 parameters for 784 inputs and 10 classes.

    Args:
      hidden: Units of each hidden layer; an empty list is multinomial logistic regression.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> count_parameters(create(Mlp(), (784,), 10))
      50890
      >>> count_parameters(create(Mlp(hidden=()), (4,), 3))
      15
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"hidden": (8, 8)}, {"hidden": ()})

    hidden: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        if min(self.hidden, default=1) < 1:
            raise ConfigError(f"model.hidden needs positive sizes, not {list(self.hidden)}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for inputs of any shape."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        units = prod(input_shape)
        for i, hidden in enumerate(self.hidden, start=1):
            layers[f"fc{i}"] = nn.Linear(units, hidden)
            layers[f"relu{i}"] = nn.ReLU()
            units = hidden
        layers[f"fc{len(self.hidden) + 1}"] = nn.Linear(units, classes)
        return nn.Sequential(layers)
