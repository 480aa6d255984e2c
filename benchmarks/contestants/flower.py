"""Flower's own simulation: stock FedAvg, a stock ClientApp, Ray actors of one CPU each."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

from _flower_client import client_app
from _protocol import Driver
from _training import flat, load_flat, network
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

server_app = ServerApp()


class Checked(FedAvg):
    """Stock FedAvg that does not go on without the updates of failed clients."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate if all replied."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                print(reply.error.reason, flush=True)
                os._exit(1)  # Flower would log an exception of the ServerApp and end well
        return super().aggregate_train(server_round, replies)


def main() -> None:
    driver = Driver()
    work = driver.work
    net = network(work["model"])
    load_flat(net, driver.arrays["weights"])
    clients = len(driver.arrays["x"])
    config = {"arrays": work["arrays"], "model": work["model"], "template": work["template"]}

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        latest = ArrayRecord(net.state_dict())

        def run(rounds: int) -> None:
            nonlocal latest
            strategy = Checked(fraction_train=work["cohort"] / clients, fraction_evaluate=0.0)
            latest = strategy.start(
                grid, latest, num_rounds=rounds, train_config=ConfigRecord(dict(config))
            ).arrays
            driver.save(lambda: flat(latest.to_torch_state_dict()))

        driver.serve(run)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "num_cpus": work["workers"],
                "include_dashboard": False,
                "log_to_driver": False,
                "logging_level": "ERROR",
            },
        },
    )


if __name__ == "__main__":
    main()
