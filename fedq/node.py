"""fedq inside Flower's own processes: from a Context to the client and the server.

``flwr run . --run-config 'hydra="..."'`` carries the same overrides as ``fedq simulate``. A node
takes its data from them in a simulation, and from its own node configuration on a device::

    flower-supernode --node-config 'data="npz" data-path="/var/lib/fedq/data.npz" partition-id=3'
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fedq import config, progress, server, simulation
from fedq.client import Client, SimulatedSite, Site
from fedq.data.base import load, of_node
from fedq.downlink import models_kept
from fedq.engines.stream import StreamGrid
from fedq.errors import ConfigError
from fedq.experiment import Experiment
from fedq.guard import limit_memory
from fedq.keys import SMALLEST_SUM, Credentials
from fedq.report import report
from fedq.results import default_run_path, read_config
from fedq.state import StateStore

# isort: split
from flwr.app import Context
from flwr.serverapp import Grid

#: In a run's configuration: 16 hexadecimal digits that stay when a run is resumed.
RUN_KEY = "run-key"

_CLIENTS: dict[str, Client] = {}


def _overrides(context: Context) -> list[str]:
    """Return the overrides in a run's configuration; what may not come by wire is refused."""
    text = str(context.run_config.get("hydra", ""))
    try:
        overrides = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"cannot read hydra={text!r}: {error}") from None
    if any(config.option([text], "plugins") for text in overrides):
        raise ConfigError("plugins are files of the local machine; use them with fedq simulate")
    return overrides


def experiment_of(context: Context) -> Experiment:
    """Return the experiment in a run's configuration, or the one it resumes.

    Raises:
      ConfigError: On a wrong override, or one that only the local command line may give.
    """
    overrides = _overrides(context)
    resume = config.option(overrides, "resume")
    if resume is None:
        experiment = config.load(overrides)
        if experiment.attack.fraction > 0:
            raise ConfigError("attacks are simulated; use attack= with fedq simulate")
        return experiment
    saved = read_config(Path(str(resume)))
    if saved.get("plugins"):
        raise ConfigError(f"{resume} uses plugins; resume it with fedq simulate")
    return config.load_resumed(saved, overrides).replace(run_dir=str(resume))


def client_of(context: Context) -> Client:
    """Return this process's client, made at the first message and kept."""
    key = repr((sorted(context.run_config.items()), context.run_id))
    if key not in _CLIENTS:
        torch.set_num_threads(1)
        _CLIENTS.clear()
        _CLIENTS[key] = Client(_site(context))
    return _CLIENTS[key]


@dataclass(frozen=True)
class DeviceSite:
    """A real device: all rows of its own data set, and a number that its owner may give it.

    Args:
      data: The registered data set, named in the node's own configuration.
      state_directory: Where the device keeps state between rounds.
    """

    data: Any
    state_directory: Path
    simulated: ClassVar[bool] = False

    def identity(self, context: Context) -> int:
        """Return ``partition-id``; without one, the number that Flower gave to the node."""
        return int(context.node_config.get("partition-id", context.node_id))

    def examples(self, context: Context) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return the training half of the device's data."""
        dataset = load(self.data)
        return dataset.train_inputs(np.arange(len(dataset.y_train))), dataset.y_train

    def store(self, context: Context) -> StateStore:
        """Return the device's own directory."""
        return StateStore(self.state_directory)

    def credentials(self, context: Context) -> Credentials:
        """Return the keys of the directory that the node's own configuration names."""
        node = context.node_config
        if "keys" not in node:
            raise ConfigError(
                "this device has no keys, and the server asks for some; make them with "
                "fedq keys device, and name their directory in --node-config 'keys=\"DIR\"'"
            )
        smallest = int(node.get("smallest-sum", SMALLEST_SUM))
        if smallest < SMALLEST_SUM:
            raise ConfigError(f"smallest-sum must be at least {SMALLEST_SUM}, not {smallest}")
        return Credentials.load(Path(str(node["keys"])).expanduser(), smallest)

    def wants_signatures(self, context: Context) -> bool:
        """Whether the device has keys: none that its owner gave it goes without."""
        return "keys" in context.node_config


def _site(context: Context) -> Site:
    """Return the site of a node: a device if its configuration names data, else a partition."""
    node: Mapping[str, Any] = context.node_config
    own = Path(str(node.get("state-dir", Path.home() / ".fedq"))) / _state_name(context)
    if "data" in node:
        return DeviceSite(of_node(node), own)
    if "num-partitions" not in node:
        raise ConfigError(
            'this node has no data; start it with --node-config \'data="npz" data-path="FILE"\', '
            "or join with --node data=npz --node data-path=FILE"
        )
    experiment = experiment_of(context).replace(clients=int(node["num-partitions"]))
    parts = simulation.partition(experiment, load(experiment.data))
    if experiment.run_dir is not None:
        own = Path(experiment.run_dir).expanduser().resolve() / simulation.CLIENT_STATE
    models = models_kept(experiment.downlink_history)
    return SimulatedSite(experiment.data, parts, own, models, experiment.seed)


def _state_name(context: Context) -> str:
    """Return the folder of a run's state: the run's key, which outlives Flower's id of it."""
    key = str(context.run_config.get(RUN_KEY, ""))
    return key if re.fullmatch("[0-9a-f]{16}", key) else str(context.run_id)


def serve(grid: Grid, context: Context) -> None:
    """Run a ServerApp's experiment over the grid that Flower gives it."""
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns
    resumed = config.option(_overrides(context), "resume") is not None
    experiment = experiment_of(context)
    experiment = experiment.replace(clients=max(len(list(grid.get_node_ids())), 1))
    path = Path(experiment.run_dir or default_run_path()).expanduser().resolve()
    console = Console(force_terminal=False, width=200)
    progress.log_to(console)
    if experiment.server_memory_gb is not None:
        limit_memory(experiment.server_memory_gb)
    opened = simulation.run_directory(experiment, path, resumed, _overrides(context))
    with opened as directory, progress.watch(console)(experiment) as observer:
        dataset = load(experiment.data)
        server.run(StreamGrid(grid), experiment, dataset, directory, observer=observer)
    console.print(report([path]))
    console.print(f"results in {path}", soft_wrap=True, highlight=False)
