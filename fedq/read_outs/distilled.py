"""Quantized distillation, Polino et al. 2018, https://arxiv.org/abs/1802.05668."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedq.random import derive
from fedq.read_outs.base import ReadOut
from fedq.registry import register
from fedq.training_config import TrainingConfig

if TYPE_CHECKING:
    from fedq.training import Trainer

#: Of the learning rate, one after the other.
_RATES = (1.0, 0.25, 0.0625)


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
        super().__post_init__()
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
