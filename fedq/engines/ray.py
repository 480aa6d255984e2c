"""Flower's own simulation runtime on Ray, for more than one machine; extra ``sim-ray``."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import TypeVar

from fedq.engines.base import Engine
from fedq.errors import ConfigError, FedqError
from fedq.registry import register

# isort: split
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

T = TypeVar("T")

#: Seconds in which a cluster must answer.
PATIENCE_S = 5.0


@register("engine", "ray")
class Ray(Engine):
    """Clients run in Ray actors: of this machine, or of a cluster that is there.

    Each machine of a cluster needs this package, the same data, and ``run_dir`` at the same path on
    a file system that all share: clients keep state there, and meet another machine in each round.

    Args:
      workers: Actors; 0 is one per CPU core of this machine or of the cluster.
      address: ``HOST:PORT`` of a cluster's head (``ray start --head``); None starts Ray here.
    """

    workers: int = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= 1024:
            raise ConfigError(f"engine.workers must be 0 (all cores) to 1024, not {self.workers}")
        if self.address is not None:
            host, _, port = self.address.rpartition(":")
            if not host or not port.isdecimal():
                raise ConfigError(f"engine.address must be HOST:PORT, not {self.address}")
            if self.workers:
                raise ConfigError(
                    "engine.workers must be 0 with engine.address: a cluster has one per CPU that "
                    "its nodes were started with (ray start --num-cpus)"
                )

    def run(self, server: Callable[[Grid], T], client: Callable[[], ClientApp], clients: int) -> T:
        """Run ``server`` as a ServerApp of Flower's simulation runtime."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("engine=ray needs Ray: pip install -e '.[sim-ray]'")
        init_args = self._init_args()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
        )  # the new default, no warning
        from flwr.simulation import run_simulation

        from fedq.engines.stream import StreamGrid

        outcome: list[T] = []
        failure: list[BaseException] = []
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            try:
                outcome.append(server(StreamGrid(grid)))
            except BaseException as error:  # Flower would log it and go on
                failure.append(error)

        quiet = logging.getLogger("flwr")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # run_simulation is deprecated, without successor
                run_simulation(
                    server_app=app,
                    client_app=client(),
                    num_supernodes=clients,
                    backend_config={
                        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                        "init_args": {**init_args, "logging_level": "ERROR"},
                    },
                )
        finally:
            quiet.setLevel(level)
        if failure:
            raise failure[0]
        if not outcome:
            raise FedqError("Flower's simulation runtime stopped before the server finished")
        return outcome[0]

    def _init_args(self) -> dict[str, str | int | bool]:
        """Return how Ray is started here, or reached."""
        if self.address is None:
            workers = self.workers or len(os.sched_getaffinity(0))
            return {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False}
        host, _, port = self.address.rpartition(":")
        try:  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"engine.address={self.address} does not answer ({error}); start the cluster with "
                "ray start --head, and give the address that it says"
            ) from None
        return {"address": self.address, "log_to_driver": False}
