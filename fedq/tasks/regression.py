"""Numbers: one or several per example, such as the next hours of a series."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from fedq.errors import ConfigError
from fedq.metrics import MAE, Metric
from fedq.registry import register
from fedq.tasks.base import Reduction, Task


@register("task", "regression")
class Regression(Task):
    """Outputs are ``(truth - offset) / divisor``; truths are (n, k) in the data's own units.

    Loss: mean squared error of the standardised outputs. Metric: mean absolute error in the data's
    units.

    Args:
      offset: Mean of the truths that the server knows.
      divisor: Their deviation.
    """

    metric: ClassVar[Metric] = MAE
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"offset": -3.0, "divisor": 20.0})

    offset: float = 0.0
    divisor: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.offset) or not 0 < self.divisor < math.inf:
            raise ConfigError(
                "task.offset must be finite and task.divisor positive, not"
                f" {self.offset} and {self.divisor}"
            )

    def loss(
        self, outputs: Tensor, inputs: Tensor, truths: Tensor, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the squared error, mean over an example's outputs."""
        standard = (truths - self.offset) / self.divisor
        error = functional.mse_loss(outputs, standard)
        return error if reduction == "mean" else error * len(outputs)

    def judge(self, outputs: Tensor, inputs: Tensor, truths: Tensor) -> Tensor:
        """Return each example's mean absolute error."""
        return (outputs * self.divisor + self.offset - truths).abs().mean(1)
