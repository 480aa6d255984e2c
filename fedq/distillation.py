"""Distillation on the server: the model after a round learns from the models that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.pruning.base import Support
from fedq.random import derive
from fedq.registry import register
from fedq.training_config import TrainingConfig

if TYPE_CHECKING:
    from fedq.training import Trainer

#: Of the learning rate of a read-out, one after the other.
_RATES = (1.0, 0.25, 0.0625)


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


class ServerDistillation:
    """What the server does to a round's aggregate with the models that went into it.

    Attributes:
      examples: Of the training half that the server has, without their labels; 0 is off.
    """

    group: ClassVar[str] = "server_distillation"
    name: ClassVar[str]
    examples: int

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
        raise NotImplementedError


@register("server_distillation", "none")
class NoDistillation(ServerDistillation):
    """The aggregate is the model."""

    examples: ClassVar[int] = 0  # type: ignore[misc]


@register("server_distillation", "feddf")
class FedDF(ServerDistillation):
    """The aggregate learns what the clients' models say on average about unlabelled examples.

    Every accepted update's model, decoded as it came and with its own quantizers, gives outputs;
    the student's divergence from their mean is minimised by SGD from the aggregate on. Of clients
    of several widths each teaches at its own, and the first width learns. Memory and time on the
    server grow with the cohort.

    Args:
      examples: Drawn by the run's seed from the training half; labels are not used.
      epochs: Over them, after every round.
      batch_size: Of a step.
      learning_rate: Of a step.

    Reference:
      Lin et al. 2020, NeurIPS, "Ensemble distillation for robust model fusion in federated
      learning", algorithm 1.
    """

    examples: int = 500
    epochs: int = 1
    batch_size: int = 50
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        _check_examples(self)
        _ = self._training  # checks its own options

    @property
    def _training(self) -> TrainingConfig:
        return TrainingConfig(
            local_epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate
        )

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
        """Return weights and state after some epochs with the ensemble as the teacher."""
        total: NDArray[np.float64] | float = 0.0
        for member in members:
            trainer = trainers[member.variant]
            trainer.load(member.weights, member.state)
            total = total + trainer.outputs(x).astype(np.float64)
        taught = np.asarray(total / len(members), np.float32)
        student = trainers[0]
        student.load(weights, state)
        if support is not None:
            student.prune(support)
        trained = student.distil(x, taught, self._training, seed)
        return student.weights(), trained.state


class ReadOut:
    """How the server makes, at the end of a run, the model that a kind of client is served.

    Attributes:
      examples: Of the training half that the server has, without their labels; 0 is off.
    """

    group: ClassVar[str] = "read_out"
    name: ClassVar[str]

    examples: int

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
        raise NotImplementedError


@register("read_out", "none")
class NoReadOut(ReadOut):
    """Weights are those of the federation, ranges those that clients of this width found."""

    examples: ClassVar[int] = 0  # type: ignore[misc]


@register("read_out", "calibrated")
class Calibrated(ReadOut):
    """Ranges and batch statistics are taken anew, from the deployed weights of each width.

    Args:
      examples: Drawn by the run's seed from the training half; labels are not used.
    """

    examples: int = 500

    def __post_init__(self) -> None:
        _check_examples(self)

    def read(
        self, trainer: Trainer, taught: NDArray[np.float32], x: NDArray[np.float32], seed: int
    ) -> None:
        """Observe."""
        trainer.calibrate(x)


@register("read_out", "distilled")
class Distilled(ReadOut):
    """Each width gets weights of its own: the federation's, taught by their own float twin.

    Statistics are taken anew first, then the quantized network learns the float network's outputs
    (Polino et al. 2018, ICLR) from four fifths of the unlabelled examples. It is kept if it is
    nearer to its teacher on the last fifth: where 8 bits are as good as float, nothing changes.

    Args:
      examples: Drawn by the run's seed from the training half; labels are not used.
      epochs: Over them: a third each at the learning rate, a quarter and a sixteenth of it, so that
        weights of few levels come to rest.
      batch_size: Of a step.
      learning_rate: Of a step.
    """

    examples: int = 500
    epochs: int = 40
    batch_size: int = 25
    learning_rate: float = 0.03

    def __post_init__(self) -> None:
        _check_examples(self)
        _ = self._training(1)  # checks its own options

    def _training(self, share: float) -> TrainingConfig:
        return TrainingConfig(
            local_epochs=-(-self.epochs // len(_RATES)),
            batch_size=self.batch_size,
            learning_rate=share * self.learning_rate,
        )

    def read(
        self, trainer: Trainer, taught: NDArray[np.float32], x: NDArray[np.float32], seed: int
    ) -> None:
        """Observe, learn, and judge."""
        trainer.calibrate(x)
        weights, state = trainer.weights(), trainer.state()
        held = np.arange(len(x)) % 5 == 4
        if not held.any():
            return
        before = trainer.divergence(x[held], taught[held])
        for phase, share in enumerate(_RATES):
            training = self._training(share)
            trainer.distil(x[~held], taught[~held], training, derive(seed, phase))
        if not trainer.divergence(x[held], taught[held]) < before:
            trainer.load(weights, state)


def _check_examples(choice: ServerDistillation | ReadOut) -> None:
    if choice.examples < 1:
        raise ConfigError(f"{choice.group}.examples must be at least 1, not {choice.examples}")
