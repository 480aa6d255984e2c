"""The main job: an experiment over simulated clients, with its float baseline beside it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq import config, manifest, registry, server
from fedq.attacks.base import Accomplice
from fedq.client import SimulatedSite, client_app
from fedq.data.base import Dataset, load
from fedq.data.partitions.base import Parts, Shares
from fedq.downlink import models_kept
from fedq.errors import ConfigError
from fedq.experiment import DEFAULT_CLIENTS, Experiment
from fedq.random import derive
from fedq.results import BASELINE, RunDirectory, default_run_path, holds_run, read_summary
from fedq.strategy import NO_DEVICES

# isort: split
from flwr.app import Context
from flwr.serverapp import Grid

LOG = logging.getLogger("fedq")
CLIENT_STATE = "clients"


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    path: Path
    summary: dict[str, Any]


#: Makes the observer of one run, for as long as the run lasts.
Watch = Callable[[Experiment], AbstractContextManager[server.Observer | None]]


def no_watch(experiment: Experiment) -> AbstractContextManager[None]:
    """Watch nothing."""
    return nullcontext()


def partition(experiment: Experiment, dataset: Dataset) -> Parts:
    """Return the training rows of each client, seeded.

    Raises:
      ConfigError: If the partition does not fit the data.
    """
    clients = experiment.clients
    if clients is None:
        ids = dataset.client_train if experiment.partition.name == "natural" else None
        clients = DEFAULT_CLIENTS if ids is None else len(np.unique(ids))
    seed = derive(experiment.seed, "partition")
    split: Parts = experiment.partition.split(dataset.strata, clients, seed, dataset.client_train)
    return split


def anchored(experiment: Experiment) -> Experiment:
    """Return the experiment with absolute paths: it may be resumed from another folder."""
    data = experiment.data
    if isinstance(getattr(data, "path", None), str):
        data = dataclasses.replace(data, path=str(Path(data.path).expanduser().resolve()))
    fleet, trace = experiment.fleet, getattr(experiment.fleet.availability, "path", None)
    if trace is not None:
        path = str(Path(trace).expanduser().resolve())
        there = dataclasses.replace(fleet.availability, path=path)
        fleet = dataclasses.replace(fleet, availability=there)
    plugins = tuple(str(Path(plugin).expanduser().resolve()) for plugin in experiment.plugins)
    return experiment.replace(data=data, fleet=fleet, plugins=plugins)


@dataclass(frozen=True)
class PoisonedSite(SimulatedSite):
    """Simulated clients, of which some train on the rows that an attack gives them.

    Args:
      attack: The registered attack.
      hostile: The partitions of hostile clients.
    """

    attack: Any = None
    hostile: frozenset[int] = frozenset()

    def examples(self, context: Context) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return the partition's rows, or what the attack makes of them if it is hostile."""
        x, y = super().examples(context)
        client = self.identity(context)
        if client not in self.hostile:
            return x, y
        dataset = load(self.data)
        place, seed = sorted(self.hostile).index(client), derive(self.seed, client, "attack")
        about = Accomplice(place, len(self.hostile), dataset.classes, dataset.high, seed)
        poisoned: tuple[NDArray[np.float32], NDArray[Any]] = self.attack.poison(x, y, about)
        return poisoned


def make_site(
    data: Mapping[str, Any],
    plugins: tuple[str, ...],
    parts: Parts,
    state_directory: Path,
    models: int,
    seed: int = 0,
    attack: Mapping[str, Any] | None = None,
    hostile: Sequence[int] = (),
) -> SimulatedSite:
    """Return the simulated clients' site; plain data in, so that it starts in any process."""
    config.load_plugins(plugins)
    rows = registry.from_config("data", data), parts, state_directory, models, seed
    if attack is None:
        return SimulatedSite(*rows)
    return PoisonedSite(*rows, registry.from_config("attack", attack), frozenset(hostile))


def run_directory(
    experiment: Experiment, path: Path, resume: bool, overrides: Sequence[str] = ()
) -> RunDirectory:
    """Return the locked directory of an experiment's run, new or continued."""
    settings = experiment.replace(run_dir=str(path)).to_config()
    if resume:
        directory = RunDirectory.open(path)
        directory.go_on(settings)
    else:
        directory = RunDirectory.create(path, settings)
    try:
        manifest.begin(path, settings, BASELINE if experiment.baseline else None, overrides)
    except BaseException:
        directory.close()
        raise
    return directory


def run_experiment(
    experiment: Experiment,
    path: Path,
    *,
    resume: bool = False,
    watch: Watch = no_watch,
    parts: Sequence[NDArray[np.int64]] | None = None,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Run one experiment into a directory, or continue the one that is there.

    Args:
      experiment: What to run.
      path: Its directory.
      resume: Continue what is there.
      watch: Shows progress.
      parts: The training rows of each client, in place of those of the experiment's partition.
      overrides: What the command line said, for the manifest.
    """
    if experiment.keys is not None:
        raise ConfigError("simulated clients have simulated keys; keys= is for a real fleet")
    if not experiment.fleet.timed and (experiment.budget.links or experiment.width_by == "speed"):
        raise ConfigError(NO_DEVICES)
    dataset = load(experiment.data)
    experiment = anchored(experiment)
    parts = partition(experiment, dataset) if parts is None else Shares.of(parts)
    filled = parts.filled()
    if len(filled) < len(parts):
        # They are left out of the federation: to ask them would only lose places in the cohort.
        empty = len(parts) - len(filled)
        LOG.warning("%d of %d clients have no data and take no part", empty, len(parts))
    site = partial(
        make_site,
        registry.to_config(experiment.data),
        tuple(experiment.plugins),
        filled,
        path.resolve() / CLIENT_STATE,
        models_kept(experiment.downlink_history),
        experiment.seed,
        registry.to_config(experiment.attack) if experiment.attack.fraction else None,
        experiment.attack.hostile(len(filled), experiment.seed),
    )
    experiment = experiment.replace(clients=len(parts))
    cohort = experiment.clients_per_round
    if isinstance(cohort, int) and cohort > len(filled):
        LOG.warning("clients_per_round=%d, but there are %d: all take part", cohort, len(filled))
    integers = experiment.secure_aggregation.integers or experiment.privacy.integers
    if integers and any(text.startswith(("codec=", "codec.")) for text in overrides):
        LOG.warning("codec=%s is not used: updates are sent as integers", experiment.codec.name)
    opened = run_directory(experiment, path, resume, overrides)
    with opened as directory, watch(experiment) as observer:

        def serve(grid: Grid) -> dict[str, Any]:
            return server.run(
                grid, experiment, dataset, directory, examples=filled.sizes, observer=observer
            )

        summary = experiment.engine.run(serve, partial(client_app, site), len(filled))
    return Outcome(path, summary)


def finished(experiment: Experiment, path: Path) -> Outcome | None:
    """Return what an earlier run of the experiment left, None unless it came to its end."""
    summary = read_summary(path)
    if summary is None:
        return None
    ended = summary.get("rounds", 0) >= experiment.rounds or "stopped" in summary
    return Outcome(path, summary) if ended else None


def simulate(
    experiment: Experiment,
    baseline: Experiment | None = None,
    *,
    resume: bool = False,
    watch: Watch = no_watch,
    overrides: Sequence[str] = (),
) -> list[Outcome]:
    """Run an experiment and, beside it, a baseline in its sub-directory ``baseline/``.

    Args:
      experiment: What to run; its ``run_dir`` is where.
      baseline: The same federation in float, or None.
      resume: Continue what is in ``run_dir``; finished runs are not run again.
      watch: Shows progress.
      overrides: What the command line said, for the manifest.
    """
    path = Path(experiment.run_dir or default_run_path())
    outcomes = []
    for which, where, said in ((experiment, path, overrides), (baseline, path / BASELINE, ())):
        if which is None:
            continue
        begun = resume and holds_run(where)
        outcome = finished(which, where) if begun else None
        if outcome is None:
            outcome = run_experiment(which, where, resume=begun, watch=watch, overrides=said)
        outcomes.append(outcome)
    return outcomes
