"""Ranges and batch statistics taken anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedq.read_outs.base import ReadOut
from fedq.registry import register

if TYPE_CHECKING:
    from fedq.training import Trainer


@register("read_out", "calibrated")
class Calibrated(ReadOut):
    """Ranges and batch statistics are taken anew, from the deployed weights of each width.

    Args:
      examples: Drawn by the run's seed from the training half; labels are not used.
    """

    examples: int = 500

    def read(
        self, trainer: Trainer, taught: NDArray[np.float32], x: NDArray[np.float32], seed: int
    ) -> None:
        """Observe."""
        trainer.calibrate(x)
