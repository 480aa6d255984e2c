"""The client of Flower's PyTorch quickstart; fedq is one line."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedq.flower import compression_mod
from quickstart.task import Net, load_data
from quickstart.task import train as fit

app = ClientApp(mods=[compression_mod])  # this line


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the partition and return the model."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    batches, _ = load_data(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    torch.manual_seed(context.node_config["partition-id"])
    loss = fit(net, batches, context.run_config["local-epochs"], context.run_config["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(batches.dataset)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
