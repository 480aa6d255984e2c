"""Anomalies as what an autoencoder cannot reconstruct (Japkowicz et al. 1995, IJCAI)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedq.metrics import AUC, Metric, recordings_auc
from fedq.registry import register
from fedq.tasks.base import Reduction, Task


@register("task", "reconstruction")
class Reconstruction(Task):
    """Outputs are the inputs, flattened; training examples are all normal.

    Truths are (n, 3) numbers: whether the example is anomalous, the recording that it is a part of,
    and the machine. Loss: mean squared error. Metric: area under the ROC curve of the recordings'
    mean errors, one curve per machine, and the mean of these areas, as in DCASE 2020 task 2.

    Reference:
      Koizumi et al. 2020, "Description and discussion on DCASE2020 challenge task 2: unsupervised
      anomalous sound detection for machine condition monitoring".
    """

    metric: ClassVar[Metric] = AUC
    dtype: ClassVar[type] = np.int64

    def loss(
        self, outputs: Tensor, inputs: Tensor, truths: Tensor, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the squared error, mean over an example's values."""
        error = functional.mse_loss(outputs, inputs.flatten(1))
        return error if reduction == "mean" else error * len(outputs)

    def judge(self, outputs: Tensor, inputs: Tensor, truths: Tensor) -> Tensor:
        """Return each example's mean squared error."""
        return (outputs - inputs.flatten(1)).square().mean(1)

    def score(self, judged: NDArray[Any], truths: NDArray[Any]) -> float:
        """Return the mean area over machines that have recordings of both kinds."""
        return recordings_auc(truths, judged)
