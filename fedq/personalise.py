"""What clients gain by a model of their own: a run's model, with own layers, and fine-tuned.

A client's test set is the whole test set, weighted to the client's own mixture of classes::

    accuracy_i = sum_c p_i(c) * (share of the test examples of class c that are right)

so that no client needs test data of its own, and nothing is drawn.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedq import config
from fedq.client import MODEL_KEYS
from fedq.errors import ConfigError
from fedq.random import derive
from fedq.results import read_config, read_model, read_summary
from fedq.simulation import CLIENT_STATE, partition
from fedq.state import StateStore

if TYPE_CHECKING:
    from fedq.training import Trainer

FILE = "personal.json"


@dataclass(frozen=True)
class Personal:
    """One client's accuracies on test examples in its own mixture of classes, in [0, 1].

    Attributes:
      client: Its number.
      examples: Training examples that it has.
      shared: Of the run's model.
      own: With the layers that the client kept for itself (local normalisations, local heads); as
        ``shared`` if the model has none, or the client never trained.
      tuned: After fine-tuning of that on the client's examples.
    """

    client: int
    examples: int
    shared: float
    own: float
    tuned: float


@dataclass(frozen=True)
class Report:
    """What all clients gain."""

    epochs: int
    learning_rate: float
    clients: tuple[Personal, ...]

    def mean(self, which: str) -> float:
        """Return the mean of an accuracy over clients."""
        return fmean(getattr(client, which) for client in self.clients)

    def worst(self, which: str) -> float:
        """Return the mean of an accuracy over the tenth of the clients that it is lowest for."""
        found = sorted(getattr(client, which) for client in self.clients)
        return fmean(found[: max(1, len(found) // 10)])

    def to_json(self) -> str:
        """Return it all as JSON."""
        kinds = ("shared", "own", "tuned")
        summary = {kind: {"mean": self.mean(kind), "worst": self.worst(kind)} for kind in kinds}
        return json.dumps({**summary, **dataclasses.asdict(self)}, indent=1)


def personalise(
    path: str | os.PathLike[str],
    *,
    epochs: int = 1,
    learning_rate: float | None = None,
    say: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Report:
    """Fine-tune a simulated run's model for each of its clients, and measure what they gain.

    Args:
      path: The run directory; nothing in it is changed.
      epochs: Of fine-tuning, as clients train in the run.
      learning_rate: Of fine-tuning; the run's if None.
      say: Told how far it is.

    Raises:
      ConfigError: If the run has no model, several kinds of clients, or no classes.
    """
    from fedq.training import trainer_for

    path = Path(path)
    experiment = config.load_resumed(read_config(path), [])
    if len(experiment.quantization.variants) > 1:
        raise ConfigError("clients of several widths have a model each already; give another run")
    tensors, spec = read_model(path)
    from fedq.data.base import load

    dataset = load(experiment.data)
    if dataset.y_train.ndim != 1 or dataset.y_train.dtype.kind not in "iu":
        raise ConfigError("personalise compares accuracies by class: it needs a classification")
    options = {"local_epochs": epochs}
    if learning_rate is not None:
        options["learning_rate"] = learning_rate  # type: ignore[assignment]
    training = dataclasses.replace(experiment.training, **options)
    trainer = trainer_for(**{key: spec[key] for key in MODEL_KEYS}, seed=0)
    weights, state = (
        layout.flatten({name: tensors[name] for name in layout.names})
        for layout in (trainer.layout, trainer.state_layout)
    )
    trainer.load(weights, state)
    x_test, y_test = dataset.test_inputs(), dataset.y_test
    classes = [(x_test[y_test == c], y_test[y_test == c]) for c in range(dataset.classes)]
    shared = _by_class(trainer, classes)
    store = StateStore(path / CLIENT_STATE)
    after = int((read_summary(path) or {}).get("rounds", experiment.rounds)) + 1
    parts = [part for part in partition(experiment, dataset) if len(part)]
    found = []
    for client, rows in enumerate(parts):
        say(client, len(parts), f"client {client}")
        trainer.load(weights, state)
        kept = (
            store.local(client, after, trainer.local_layout) if trainer.local_layout.size else None
        )
        if kept is not None:
            trainer.load_local(kept)
        own = shared if kept is None else _by_class(trainer, classes)
        y = dataset.y_train[rows]
        seed = derive(experiment.seed, after, client, "personalise")
        trainer.train(dataset.train_inputs(rows), y, training, seed)
        tuned = _by_class(trainer, classes)
        mixture = np.bincount(y, minlength=dataset.classes) / len(y)
        accuracies = [float(mixture @ accuracy) for accuracy in (shared, own, tuned)]
        found.append(Personal(client, len(rows), *accuracies))
    return Report(epochs, training.learning_rate, tuple(found))


def _by_class(
    trainer: Trainer, classes: list[tuple[NDArray[np.float32], NDArray[np.int64]]]
) -> NDArray[np.float64]:
    """Return the share of right answers for each class; 0 for one without test examples."""
    return np.array([trainer.evaluate(x, y).accuracy if len(y) else 0.0 for x, y in classes])
