"""What every model is: a frozen configuration that builds a network for a shape of data."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fedq.errors import ConfigError
from fedq.random import derive

_KINDS = {1: "features (F,)", 2: "series (C, T)", 3: "images (C, H, W)"}


class Model(abc.ABC):
    """A network as a function of its input and output shapes.

    Subclasses are registered frozen dataclasses. What they build is traceable by ``torch.fx`` (no
    control flow that depends on values), holds float32 parameters only, and gives ``(n, classes)``
    logits for ``(n, *input_shape)`` inputs; or as many other numbers, if the task is another one.
    """

    group: ClassVar[str] = "model"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abc.abstractmethod
    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return a freshly initialised network.

        Args:
          input_shape: One example, channels first: images ``(C, H, W)``, series ``(C, T)``,
            features ``(F,)``.
          classes: Number of outputs.

        Raises:
          ConfigError: If the model does not take inputs of this shape.
        """

    def _check(self, input_shape: tuple[int, ...], dimensions: int, smallest: int = 1) -> None:
        """Refuse shapes of another kind, or with an extent (height, width, time) too small."""
        kind = _KINDS.get(len(input_shape), "inputs")
        if len(input_shape) != dimensions:
            raise ConfigError(
                f"model={self.name} takes {_KINDS[dimensions]}, not {kind} of shape {input_shape};"
                " use model=auto to choose by the data"
            )
        if min(input_shape[1:], default=smallest) < smallest:
            raise ConfigError(
                f"model={self.name} needs {kind} of at least {smallest} in every extent,"
                f" not {input_shape}; use model=mlp for small inputs"
            )


def create(model: Model, input_shape: tuple[int, ...], classes: int, seed: int = 0) -> nn.Module:
    """Build a network whose initial weights are a pure function of the arguments.

    torch's global generator is left as it was found.

    Args:
      model: A registered model.
      input_shape: One example, channels first.
      classes: Number of outputs, at least 1.
      seed: Any integer.

    Raises:
      ConfigError: If the model does not take inputs of this shape.

    Example:
      >>> import fedq
      >>> network = create(fedq.build("model", "mlp"), (784,), 10, seed=0)
      >>> count_parameters(network)
      50890
    """
    if not input_shape or min(input_shape) < 1 or classes < 1:
        raise ConfigError(
            f"a model needs a non-empty input and at least 1 output,"
            f" not {tuple(input_shape)} and {classes}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "model"))
        return model.build(tuple(int(n) for n in input_shape), int(classes))


def count_parameters(network: nn.Module) -> int:
    """Return the number of trainable parameters, d."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
