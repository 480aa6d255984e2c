"""Who is attacked by reconstruction: networks with weights, examples, and what is known of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq import registry
from fedq.codecs.base import Codec
from fedq.codecs.error_feedback import ErrorFeedback
from fedq.layout import Layout, Vector
from fedq.random import derive, generator
from fedq.robustness import _fidelity as fidelity
from fedq.robustness._cells import Cells, cells
from fedq.robustness._fidelity import Example
from fedq.robustness.subject import Subject
from fedq.training import Trainer, trainer_for
from fedq.training_config import TrainingConfig

#: Of the values of series and features, whose extremes are rare: what a search keeps to.
_QUANTILES = (0.005, 0.995)


@dataclasses.dataclass(frozen=True, eq=False)
class Knowledge:
    """What an attacker knows of data, from examples of its own.

    Attributes:
      examples: (n, *shape) float32.
      labels: (n,).
    """

    examples: NDArray[np.float32]
    labels: NDArray[np.int64]

    @property
    def image(self) -> bool:
        """Whether examples are images."""
        return self.examples.ndim == 4

    @cached_property
    def span(self) -> tuple[float, float]:
        """Between which values inputs are."""
        ends = (0.0, 1.0) if self.image else _QUANTILES
        low, high = np.quantile(self.examples, ends)
        return float(low), float(max(high, low + 1e-6))

    @cached_property
    def typical(self) -> tuple[float, float]:
        """Means of inputs that are not positive, and of those that are."""
        above = self.examples > 0
        low = float(self.examples[~above].mean()) if not above.all() else self.span[0]
        return low, float(self.examples[above].mean()) if above.any() else self.span[1]

    @property
    def measure(self) -> str:
        """What fidelity is stated in."""
        return "PSNR" if self.image else "SNR"

    @property
    def recovered(self) -> float:
        """Decibels from which an example counts as recovered: a tenth of its deviation or so."""
        return 20.0 if self.image else 10.0

    @property
    def likeness(self) -> str:
        """What stands beside decibels."""
        return "SSIM" if self.image else "correlation"

    def decibels(self, found: Sequence[Example], truths: NDArray[np.float32]) -> Any:
        """Return the fidelity of each reconstruction, (n,)."""
        width = self.span[1] - self.span[0]
        pairs = zip(found, truths, strict=True)
        return np.array([fidelity.decibels(x, truth, width) for x, truth in pairs])

    def nearest(self, candidates: Sequence[Example], truths: NDArray[np.float32]) -> Any:
        """Return the fidelity of the best candidate for each example, (n,)."""
        if not len(candidates):
            return np.full(len(truths), -fidelity.MOST_DB)
        table = np.stack(candidates).reshape(len(candidates), -1).astype(np.float64)
        width = self.span[1] - self.span[0]
        errors = [np.square(table - truth.ravel()).mean(axis=1).min() for truth in truths]
        pairs = zip(errors, truths, strict=True)
        return np.array([fidelity.ratio(float(error), truth, width) for error, truth in pairs])

    def alike(self, found: Sequence[Example], truths: NDArray[np.float32]) -> float:
        """Return the mean likeness of reconstructions."""
        width = self.span[1] - self.span[0]
        pairs = zip(found, truths, strict=True)
        return float(np.mean([fidelity.similarity(x, truth, width) for x, truth in pairs]))

    def guess(self, truths: NDArray[np.float32]) -> float:
        """Return the mean fidelity of the mean example: that of knowing nothing more."""
        mean = self.examples.mean(axis=0)
        return float(self.decibels([mean] * len(truths), truths).mean())

    def shaped(self, x: NDArray[np.float64]) -> Example:
        """Return a flat input as an example."""
        return np.clip(x, *self.span).reshape(self.examples.shape[1:]).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A network to train, from weights that the server sends.

    Attributes:
      trainer: Of the network.
      weights: (d,) float32.
      state: (s,) float32.
    """

    trainer: Trainer
    weights: Vector
    state: Vector

    @classmethod
    def of(cls, subject: Subject, model: Any, quantization: Any) -> Target:
        """Return a network as the run's server would initialise it."""
        data = subject.dataset
        trainer = trainer_for(
            model,
            quantization,
            list(data.input_shape),
            data.classes,
            seed=derive(subject.experiment.seed, "model"),
        )
        return cls(trainer, trainer.weights(), trainer.state())

    @classmethod
    def own(cls, subject: Subject) -> Target:
        """Return the run's own network."""
        chosen = subject.experiment.model, subject.experiment.quantization
        return cls.of(subject, *map(registry.to_config, chosen))

    @classmethod
    def dense(cls, subject: Subject, hidden: int) -> Target:
        """Return a float network with one hidden layer, which a server may name instead."""
        return cls.of(subject, {"name": "mlp", "hidden": [hidden]}, {"name": "none"})

    @property
    def layout(self) -> Layout:
        """Names and shapes of the weights."""
        return self.trainer.layout

    @property
    def starts_dense(self) -> bool:
        """Whether the first layer sees the whole input, and has a bias."""
        shapes = self.layout.shapes
        return len(shapes) > 1 and len(shapes[0]) == 2 and shapes[1] == shapes[0][:1]

    def update(
        self, x: NDArray[np.float32], y: NDArray[np.int64], training: TrainingConfig, seed: int
    ) -> Vector:
        """Return what training on examples adds to the weights, (d,) float32."""
        self.trainer.load(self.weights, self.state)
        return np.asarray(self.trainer.train(x, y, training, seed).delta)

    def first_layer(self, update: Vector) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the first layer's part of an update: (out, in) and (out,)."""
        weight, bias = self.layout.tensors[:2]
        table = update[weight.slice].reshape(weight.shape)
        return table.astype(np.float64), update[bias.slice].astype(np.float64)

    def label(self, update: Vector) -> int:
        """Return the class whose output one example's update raises the most.

        Reference:
          Zhao, Mopuri and Bilen 2020, "iDLG: improved deep leakage from gradients",
          arXiv:2001.02610.
        """
        last = self.layout.tensors[-1]
        values = update[last.slice].reshape(last.shape[0], -1)
        return int(np.argmax(values.sum(axis=1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Wire:
    """A codec between client and attacker.

    Attributes:
      codec: Of the client.
      layout: Of its updates.
      surrogate: (d,) float32, an update of the attacker's own.
    """

    codec: Codec
    layout: Layout
    surrogate: Vector

    def seen(self, update: Vector, seed: int) -> tuple[Cells, float]:
        """Return what an update's payload tells, and its bits per parameter."""
        payload = self.codec.encode(update, self.layout, seed)
        bits = 8 * len(payload) / self.layout.size
        return cells(payload, self.layout, self.surrogate), bits


def sent(codec: Codec) -> Codec:
    """Return the codec of a client's first update: it has no residual yet."""
    return codec.inner if isinstance(codec, ErrorFeedback) else codec


def drawn(subject: Subject, count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return so many training examples of a run, drawn by a seed, and their labels."""
    data = subject.dataset
    total = len(data.y_train)
    rows = generator(seed).choice(total, min(count, total), replace=False)
    return data.train_inputs(rows), data.y_train[rows]
