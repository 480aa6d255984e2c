"""What every task is: a loss to train by and a metric to judge by."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedq.errors import ConfigError
from fedq.metrics import Metric

Reduction = Literal["mean", "sum"]


class Task(abc.ABC):
    """What a network's outputs mean: how far they are from the truth, and how good that is.

    Subclasses are registered frozen dataclasses. Which task it is follows from the data
    (:attr:`fedq.data.base.Dataset.task`) and travels in every request, so that server and clients
    agree. Inputs are (n, *shape) float32, outputs (n, k), truths what the data set gives beside
    inputs.
    """

    group: ClassVar[str] = "task"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: What a model is judged by.
    metric: ClassVar[Metric]
    #: Truths: their type, and their axes.
    dtype: ClassVar[type] = np.float32
    dimensions: ClassVar[int] = 2

    def truths(self, x: NDArray[np.float32], y: NDArray[Any]) -> NDArray[Any]:
        """Return truths in this task's type.

        Raises:
          ConfigError: If there are no examples, or they are not of this task.
        """
        if len(x) == 0 or y.ndim != self.dimensions or len(y) != len(x):
            what = "label" if self.dimensions == 1 else "row of truths"
            raise ConfigError(
                f"task={self.name} needs one {what} for each of n > 0 examples, not {y.shape} for"
                f" {len(x)}"
            )
        return y.astype(self.dtype, copy=False)

    @abc.abstractmethod
    def loss(
        self, outputs: Tensor, inputs: Tensor, truths: Tensor, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the loss of a batch, mean or sum over its examples."""

    @abc.abstractmethod
    def judge(self, outputs: Tensor, inputs: Tensor, truths: Tensor) -> Tensor:
        """Return what the metric needs of each example, (n,)."""

    def score(self, judged: NDArray[Any], truths: NDArray[Any]) -> float:
        """Return the metric over a test set, given what :meth:`judge` said: by default its mean."""
        return float(judged.mean())

    def divergence(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """Return how far outputs are from a teacher's, mean over the batch: by default squared."""
        return torch.nn.functional.mse_loss(outputs, taught)

    def evaluate(
        self, outputs: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[Any]
    ) -> float:
        """Return the metric of outputs that were computed elsewhere, such as by a device's runtime.

        Args:
          outputs: (n, k).
          x: (n, *shape) inputs.
          y: (n, ...) truths.
        """
        truths = self.truths(x, y)
        tensors = (torch.from_numpy(np.ascontiguousarray(a)) for a in (outputs, x, truths))
        return self.score(self.judge(*tensors).numpy(), truths)
