"""A dense autoencoder for machine sound, the one of DCASE 2020 task 2 (Koizumi et al. 2020)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

from torch import nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.models.norms import Norm, norm_layer
from fedq.registry import register


@register("model", "autoencoder")
class Autoencoder(Model):
    """Dense layers down to a few units and up again, each normalised and rectified but the last.

    The anomaly detector of MLPerf Tiny (Banbury et al. 2021): 267,928 parameters for five frames of
    128 bands. Inputs of any shape are flattened; as a task's model it gives them back.

    Args:
      hidden: Units of the layers down; those up mirror them.
      code: Units of the narrowest layer.
      norm: What follows each layer; see :mod:`fedq.models.norms`.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> count_parameters(create(Autoencoder(), (640,), 640))
      267928
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"hidden": (16,), "code": 4},
        {"hidden": (8, 8), "code": 2},
    )

    hidden: tuple[int, ...] = (128, 128, 128, 128)
    code: int = 8
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        if min((*self.hidden, self.code)) < 1:
            raise ConfigError(
                f"model.hidden and model.code need positive sizes, not {list(self.hidden)} and"
                f" {self.code}"
            )

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for inputs of any shape."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        before = prod(input_shape)
        for i, units in enumerate((*self.hidden, self.code, *self.hidden[::-1]), start=1):
            layers[f"fc{i}"] = nn.Linear(before, units)
            layers[f"norm{i}"] = norm_layer(self.norm, units, 1)
            layers[f"relu{i}"] = nn.ReLU()
            before = units
        layers["out"] = nn.Linear(before, classes)
        return nn.Sequential(layers)
