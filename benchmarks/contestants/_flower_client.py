"""The ClientApp of ``flower.py``, in a module that Ray's actors can import."""

from __future__ import annotations

from functools import cache

import torch
from _protocol import load
from _training import BATCH_SIZE, LEARNING_RATE, examples, network, train
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

client_app = ClientApp()


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
