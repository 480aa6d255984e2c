"""Flower's own simulation runtime on Ray, for more than one machine; extra ``sim-ray``."""

from __future__ import annotations

import importlib.util
import logging
import os
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


@register("engine", "ray")
class Ray(Engine):
    """Clients run in Ray actors.

    Args:
      workers: Actors; 0 is one per CPU core.
    """

    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= 1024:
            raise ConfigError(f"engine.workers must be 0 (all cores) to 1024, not {self.workers}")

    def run(self, server: Callable[[Grid], T], client: Callable[[], ClientApp], clients: int) -> T:
        """Run ``server`` as a ServerApp of Flower's simulation runtime."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("engine=ray needs Ray: pip install -e '.[sim-ray]'")
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

        workers = self.workers or len(os.sched_getaffinity(0))
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
                        "init_args": {
                            "num_cpus": workers,
                            "include_dashboard": False,
                            "log_to_driver": False,
                            "logging_level": "ERROR",
                        },
                    },
                )
        finally:
            quiet.setLevel(level)
        if failure:
            raise failure[0]
        if not outcome:
            raise FedqError("Flower's simulation runtime stopped before the server finished")
        return outcome[0]
