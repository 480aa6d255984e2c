"""What is attacked: one run's model as it is deployed, its float twin, and its data."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedq import config
from fedq.data.base import Dataset
from fedq.errors import ConfigError, FedqError
from fedq.experiment import Experiment
from fedq.export import _reference
from fedq.export._convert import convert
from fedq.export._graph import Graph
from fedq.export._source import outputs, source
from fedq.quantization.base import float_twin
from fedq.quantization.fake import FakeQuantizer
from fedq.random import generator
from fedq.results import read_config, read_model
from fedq.simulation import partition

_BATCH = 500


@dataclass(frozen=True, eq=False)
class Subject:
    """A run to evaluate; made by :meth:`load`.

    Attributes:
      path: The run directory.
      experiment: Its configuration.
      dataset: Its data.
      network: The trained network with its fake quantizers, in evaluation mode; gradients pass them
        by the straight-through estimator. Outputs are those of training, not of the device.
      tensors: Of ``model.safetensors``.
    """

    path: Path
    experiment: Experiment
    dataset: Dataset
    network: nn.Module
    tensors: dict[str, NDArray[np.float32]]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subject:
        """Read a run that has ended.

        Raises:
          ConfigError: If it has no model.
          FedqError: If the model is damaged or holds numbers that are not finite.
        """
        path = Path(path)
        experiment = config.load_resumed(read_config(path), [])
        tensors, _ = read_model(path)
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise FedqError(f"{path}: {name} is not finite; there is nothing to evaluate")
        found = source(experiment, tensors, experiment.quantization)
        if not found.dataset.classes:
            raise ConfigError(f"{path} is no classifier; there is nothing here to attack it with")
        found.network.requires_grad_(False)
        return cls(path, experiment, found.dataset, found.network, tensors)

    @cached_property
    def graph(self) -> Graph | None:
        """The integer graph that devices compute; None if the network has no such form."""
        try:
            return convert(self.network, self.dataset.input_shape)
        except ConfigError:
            return None

    def deployed(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits that devices compute, (n, classes), for inputs (n, *input_shape).

        Integer arithmetic where the network has an integer form, else the fake quantizers.
        """
        graph = self.graph
        if graph is None:
            return outputs(self.network, x)
        grid = graph.output.grid
        parts = []
        for start in range(0, len(x), _BATCH):
            integers = _reference.run(graph, x[start : start + _BATCH]) - grid.zero_point
            parts.append((grid.scale * integers).astype(np.float32))
        return np.concatenate(parts)

    @cached_property
    def twin_network(self) -> nn.Module:
        """The float twin as a network of its own: the same weights, quantizers off for good."""
        with self.twin() as twin:
            return copy.deepcopy(twin)

    def twin_logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of the float twin, (n, classes), for inputs (n, *input_shape)."""
        return outputs(self.twin_network, x)

    @contextmanager
    def twin(self) -> Iterator[nn.Module]:
        """Yield the network without its quantizers, in the ``with`` block."""
        with float_twin(self.network):
            yield self.network

    def accuracy(self, x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        """Return the share of examples that the deployed model gets right."""
        return float((self.deployed(x).argmax(1) == y).mean())

    @property
    def quantized(self) -> bool:
        """Whether the network has quantizers."""
        return any(isinstance(module, FakeQuantizer) for module in self.network.modules())

    @property
    def pixels(self) -> bool:
        """Whether inputs are uint8 images: multiples of 1/255 in [0, 1]."""
        return self.dataset.kind == "image" and self.dataset.x_train.dtype == np.uint8

    def on_grid(self, x: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return inputs as a sensor can give them: images of uint8 are rounded and clipped."""
        if self.pixels:
            x = np.rint(np.clip(x, 0, 1) * 255) / 255
        return np.ascontiguousarray(x, np.float32)

    def sample(self, examples: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return some test examples and their labels, all if there are no more, in their order."""
        total = len(self.dataset.y_test)
        rows = np.sort(generator(seed).permutation(total)[:examples])
        return self.dataset.test_inputs()[rows], self.dataset.y_test[rows]

    @cached_property
    def parts(self) -> Sequence[NDArray[np.int64]]:
        """The training rows of each client; some may be empty."""
        return partition(self.experiment, self.dataset)
