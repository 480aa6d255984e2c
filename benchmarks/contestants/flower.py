"""Flower's own simulation: stock FedAvg, a stock ClientApp, Ray actors of one CPU each."""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

import numpy as np
import torch
from _protocol import Driver, load
from _training import examples, load_flat, network, train
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client_app = ClientApp()
server_app = ServerApp()


@cache
def prepared(arrays: str, model: str):  # noqa: ANN201
    """Network and data, made once in each actor: kinder to Flower than its own examples."""
    torch.set_num_threads(1)
    return network(model), *examples(load(arrays))


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    config = message.content["config"]
    net, xs, ys = prepared(str(config["arrays"]), str(config["model"]))
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    order = np.random.default_rng().permutation(len(ys[client]))
    loss = train(net, xs[client], ys[client], order)
    content = RecordDict(
        {
            "arrays": ArrayRecord(net.state_dict()),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(ys[client])}),
        }
    )
    return Message(content=content, reply_to=message)


def main() -> None:
    driver = Driver()
    work = driver.work
    net = network(work["model"])
    load_flat(net, driver.arrays["weights"])
    clients = len(driver.arrays["x"])
    config = {"arrays": work["arrays"], "model": work["model"]}

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        latest = ArrayRecord(net.state_dict())

        def run(rounds: int) -> None:
            nonlocal latest
            strategy = FedAvg(fraction_train=work["cohort"] / clients, fraction_evaluate=0.0)
            latest = strategy.start(
                grid, latest, num_rounds=rounds, train_config=ConfigRecord(dict(config))
            ).arrays

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
