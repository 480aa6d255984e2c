"""One of several classes, by softmax and cross-entropy (Bridle 1990, NATO ASI F68)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional

from fedq.metrics import ACCURACY, Metric
from fedq.registry import register
from fedq.tasks.base import Reduction, Task

#: Softens the logits that a quantized network is taught with (Hinton et al. 2015, section 2).
TEMPERATURE = 2.0


@register("task", "classification")
class Classification(Task):
    """Outputs are logits, one per class; truths (n,) numbers of classes.

    Loss: cross-entropy in nats. Metric: accuracy, the share of correct answers.
    """

    metric: ClassVar[Metric] = ACCURACY
    dtype: ClassVar[type] = np.int64
    dimensions: ClassVar[int] = 1

    def loss(
        self, outputs: Tensor, inputs: Tensor, truths: Tensor, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy."""
        return functional.cross_entropy(outputs, truths, reduction=reduction)

    def judge(self, outputs: Tensor, inputs: Tensor, truths: Tensor) -> Tensor:
        """Return whether each answer is correct."""
        return outputs.argmax(1) == truths

    def divergence(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """Return T**2 KL(teacher || student) of softened outputs, mean over the batch."""
        student = functional.log_softmax(outputs / TEMPERATURE, 1)
        teacher = functional.log_softmax(taught / TEMPERATURE, 1)
        divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return divergence * TEMPERATURE**2
