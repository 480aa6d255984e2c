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

import torch
from _protocol import Driver, load
from _training import BATCH_SIZE, LEARNING_RATE, examples, load_flat, network, train
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

client_app = ClientApp()
server_app = ServerApp()


@cache
def prepared(arrays: str, model: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """Network and data, made once in each actor: kinder to Flower than its own template."""
    torch.set_num_threads(1)
    return network(model), *examples(load(arrays))


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    """Train as the template of ``flwr new`` does, or with the training code of the plain loop."""
    config = message.content["config"]
    client = int(context.node_config["partition-id"])
    net, xs, ys = prepared(str(config["arrays"]), str(config["model"]))
    x, y = xs[client], ys[client]
    if config["template"]:
        net = network(str(config["model"])).to(memory_format=torch.contiguous_format)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    if config["template"]:
        loader = DataLoader(TensorDataset(x.contiguous(), y), batch_size=BATCH_SIZE, shuffle=True)
        loss = template_train(net, loader)
    else:
        loss = train(net, x, y, torch.randperm(len(y)))
    content = RecordDict(
        {
            "arrays": ArrayRecord(net.state_dict()),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(y)}),
        }
    )
    return Message(content=content, reply_to=message)


def template_train(net: nn.Module, loader: DataLoader) -> float:
    """One epoch as in Flower's template, with plain SGD."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    net.train()
    running_loss = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(net(images), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    return running_loss / len(loader)


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
