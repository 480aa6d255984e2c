"""What a read-out is."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError

if TYPE_CHECKING:
    from fedq.training import Trainer


class ReadOut(abc.ABC):
    """How the server makes, at the end of a run, the model that a kind of client is served.

    Attributes:
      examples: Of the training half that the server has, without their labels; 0 is off.
    """

    group: ClassVar[str] = "read_out"
    name: ClassVar[str]

    examples: int

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ConfigError(f"{self.group}.examples must be at least 1, not {self.examples}")

    @abc.abstractmethod
    def read(
        self, trainer: Trainer, taught: NDArray[np.float32], x: NDArray[np.float32], seed: int
    ) -> None:
        """Let a trainer, loaded with the federation's model, become the one that is served.

        Args:
          trainer: Of the kind of client.
          taught: (n, k), what the float model says.
          x: (n, *shape) inputs.
          seed: Of the order of the examples.
        """
