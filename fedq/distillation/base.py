"""Distillation on the server: the model after a round learns from the models that made it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.pruning.base import Support

if TYPE_CHECKING:
    from fedq.training import Trainer


@dataclass(frozen=True, eq=False)
class Member:
    """A client's model as the server knows it.

    Attributes:
      variant: Which kind of client it is, and which of the trainers computes it.
      weights: (d,) float32.
      state: (s,) float32.
    """

    variant: int
    weights: Vector
    state: Vector


class ServerDistillation(abc.ABC):
    """What the server does to a round's aggregate with the models that went into it.

    Attributes:
      examples: Of the training half that the server has, without their labels; 0 is off.
    """

    group: ClassVar[str] = "server_distillation"
    name: ClassVar[str]
    examples: int

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ConfigError(f"{self.group}.examples must be at least 1, not {self.examples}")

    @abc.abstractmethod
    def refined(
        self,
        trainers: Sequence[Trainer],
        members: Sequence[Member],
        weights: Vector,
        state: Vector,
        x: NDArray[np.float32],
        seed: int,
        support: Support | None = None,
    ) -> tuple[Vector, Vector]:
        """Return the weights and the state after distillation.

        Args:
          trainers: By kind of client; the first one's network is the student.
          members: The ensemble, in the order of the cohort.
          weights: (d,) float32, the aggregate.
          state: (s,) float32, of the first kind.
          x: (n, *shape) inputs.
          seed: Of the order of the examples.
          support: What of the weights may move.
        """
