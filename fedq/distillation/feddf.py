"""Ensemble distillation, Lin et al. 2020, https://arxiv.org/abs/2006.07242."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedq.distillation.base import Member, ServerDistillation
from fedq.layout import Vector
from fedq.pruning.base import Support
from fedq.registry import register
from fedq.training_config import TrainingConfig

if TYPE_CHECKING:
    from fedq.training import Trainer


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
        super().__post_init__()
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
