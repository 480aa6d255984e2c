"""Federations for evaluations: a run's own recipe on other rows, watched as its server would."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq import registry, server
from fedq.client import SimulatedSite, client_app
from fedq.data.base import Dataset
from fedq.engines.local import LocalGrid
from fedq.engines.recorder import Recorder, Seen
from fedq.experiment import Experiment
from fedq.random import derive
from fedq.results import RunDirectory, read_model
from fedq.simulation import CLIENT_STATE, partition
from fedq.training import Trainer, trainer_for

# isort: split
from flwr.app import Context
from flwr.serverapp import Grid


@dataclass(frozen=True)
class _Site(SimulatedSite):
    """Simulated clients whose rows are of a data set in memory, not of the experiment's."""

    dataset: Dataset | None = None

    def examples(self, context: Context) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the partition's rows."""
        assert self.dataset is not None
        rows = self.parts[self.identity(context)]
        return self.dataset.train_inputs(rows), self.dataset.y_train[rows]


def trainer_of(experiment: Experiment, dataset: Dataset) -> Trainer:
    """Return a trainer of an experiment's quantized network, as its clients have it."""
    return trainer_for(
        registry.to_config(experiment.model),
        registry.to_config(experiment.quantization),
        list(dataset.input_shape),
        dataset.classes,
        seed=derive(experiment.seed, "model"),
    )


def clients(experiment: Experiment, dataset: Dataset) -> list[NDArray[np.int64]]:
    """Return the training rows of each client that has any; a client's place is its number."""
    return [part for part in partition(experiment, dataset) if len(part)]


def masks(experiment: Experiment) -> str:
    """Return why a run's server sees no single client's coded update; empty if it does."""
    if experiment.secure_aggregation.integers:
        return "secure aggregation: the server of this run sees sums of updates only"
    if experiment.privacy.integers:
        return "clients of this run send integers with noise in place of the codec's payload"
    if experiment.privacy.unit == "example":
        return "clients of this run train with noise; their updates are audited by canaries"
    return ""


def federate(
    experiment: Experiment,
    dataset: Dataset,
    folder: Path,
    workers: int,
    see: Callable[[Seen], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Run an experiment's federation on a data set; return the final model's tensors.

    It trains, encodes, aggregates and protects as the experiment says, over the local engine. With
    the experiment's own data and seed it gives the same model.

    Args:
      experiment: The recipe.
      dataset: Whose training half is shared out as the recipe says.
      folder: For the run; removed before and after.
      workers: Processes.
      see: Called with what an honest but curious server sees of each round.
    """
    recipe = experiment.replace(
        downlink_history=0,  # whole models, which a recorder can open
        evaluate_every=experiment.rounds,
        sealed=False,
        keys=None,
        resume=None,
        trackers=(),
    )
    parts = clients(recipe, dataset)
    recipe = recipe.replace(clients=len(partition(recipe, dataset)))
    trainer = trainer_of(recipe, dataset)
    shutil.rmtree(folder, ignore_errors=True)
    state = folder / CLIENT_STATE
    site = _Site(recipe.data, dict(enumerate(parts)), state, 0, recipe.seed, dataset=dataset)
    try:
        with (
            RunDirectory.create(folder, recipe.replace(run_dir=str(folder)).to_config()) as place,
            LocalGrid(partial(client_app, lambda: site), len(parts), workers=workers) as inner,
        ):
            grid: Grid = inner
            if see is not None:
                grid = Recorder(inner, trainer.layout, trainer.state_layout, see)
            server.run(grid, recipe, dataset, place, examples=[len(part) for part in parts])
            tensors, _ = read_model(folder)
            return tensors
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Pool:
    """A run's training rows and, behind them, its test rows: members and others of its model.

    Attributes:
      dataset: The run's.
      seed: Which client a test row would belong to, where the data says of training rows.
    """

    dataset: Dataset
    seed: int

    @property
    def labels(self) -> NDArray[np.int64]:
        """All labels, (n,)."""
        return np.concatenate([self.dataset.y_train, self.dataset.y_test])

    @property
    def inputs(self) -> NDArray[np.float32]:
        """All inputs, (n, *shape) float32."""
        data = self.dataset
        return np.concatenate([data.train_inputs(np.arange(len(data.y_train))), data.test_inputs()])

    @property
    def members(self) -> NDArray[np.bool_]:
        """Which rows the run trained on, (n,)."""
        return np.arange(len(self.labels)) < len(self.dataset.y_train)

    def split(self, inside: NDArray[np.bool_]) -> Dataset:
        """Return a data set that trains on some rows and tests on the others."""
        data = self.dataset
        x, y = np.concatenate([data.x_train, data.x_test]), self.labels
        owners = None
        if data.client_train is not None:
            rng = np.random.default_rng(derive(self.seed, "owners"))
            drawn = rng.choice(data.client_train, len(data.y_test))
            owners = np.concatenate([data.client_train, drawn])[inside]
        return Dataset(
            x_train=x[inside],
            y_train=y[inside],
            x_test=x[~inside],
            y_test=y[~inside],
            classes=data.classes,
            client_train=owners,
            kind=data.kind,
        )

    def inputs_of(self, split: Dataset, inside: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return all inputs in the pool's order, scaled as a split's own pipeline does."""
        inputs = np.empty((len(inside), *self.dataset.input_shape), np.float32)
        inputs[inside] = split.train_inputs(np.arange(len(split.y_train)))
        inputs[~inside] = split.test_inputs()
        return inputs


def save(path: Path, **arrays: Any) -> None:
    """Write arrays so that a kill leaves none or all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)
