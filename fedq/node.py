"""fedq inside Flower's own processes: from a Context to the client and the server.

``flwr run . --run-config 'hydra="..."'`` carries the same overrides as ``fedq simulate``. A node
takes its data from them in a simulation, and from its own node configuration on a device::

    flower-supernode --node-config 'data="npz" data-path="/var/lib/fedq/data.npz" partition-id=3'
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedq import config, progress, registry, server, simulation
from fedq.client import Client, SimulatedSite
from fedq.data.base import load
from fedq.engines.stream import StreamGrid
from fedq.errors import ConfigError
from fedq.experiment import Experiment
from fedq.results import RunDirectory, default_run_path

# isort: split
from flwr.app import Context
from flwr.serverapp import Grid

_CLIENTS: dict[str, Client] = {}


def experiment_of(context: Context) -> Experiment:
    """Return the experiment in a run's configuration.

    Raises:
      ConfigError: On a wrong override, or one that only the local command line may give.
    """
    text = context.run_config.get("hydra", "")
    overrides = shlex.split(str(text))
    if config.option(overrides, "plugins"):
        raise ConfigError("plugins are files of the local machine; use them with fedq simulate")
    return config.load(overrides)


def client_of(context: Context) -> Client:
    """Return this process's client, made at the first message and kept."""
    key = repr((sorted(context.run_config.items()), context.run_id))
    if key not in _CLIENTS:
        torch.set_num_threads(1)
        _CLIENTS.clear()
        _CLIENTS[key] = Client(_site(context))
    return _CLIENTS[key]


def _site(context: Context) -> SimulatedSite:
    node: dict[str, Any] = dict(context.node_config)
    directory = Path(str(node.get("state-dir", Path.home() / ".fedq"))) / str(context.run_id)
    if "data" in node:  # a device: all of its data is its own
        options = {k.removeprefix("data-"): v for k, v in node.items() if k.startswith("data-")}
        data = registry.build("data", str(node["data"]), **options)
        own = int(node.get("partition-id", context.node_id))
        rows = torch.arange(len(load(data).y_train)).numpy()
        return SimulatedSite(data, {own: rows}, directory)
    experiment = experiment_of(context).replace(clients=int(node["num-partitions"]))
    parts = simulation.partition(experiment, load(experiment.data))
    return SimulatedSite(experiment.data, dict(enumerate(parts)), directory)


def serve(grid: Grid, context: Context) -> None:
    """Run a ServerApp's experiment over the grid that Flower gives it."""
    torch.set_num_threads(1)
    experiment = experiment_of(context)
    nodes = len(list(grid.get_node_ids()))
    experiment = experiment.replace(clients=max(nodes, 1))
    path = Path(experiment.run_dir or default_run_path()).expanduser().resolve()
    console = Console(force_terminal=False, width=200)
    progress.log_to(console)
    with (
        RunDirectory.create(path, experiment.to_config()) as directory,
        progress.watch(console)(experiment) as observer,
    ):
        server.run(
            StreamGrid(grid), experiment, load(experiment.data), directory, observer=observer
        )
    console.print(f"results  {path}  (pid {os.getpid()})", soft_wrap=True)
