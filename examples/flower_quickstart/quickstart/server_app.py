"""The server of Flower's PyTorch quickstart; fedq is one line."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import fedq
from fedq.flower import CompressedStrategy
from quickstart.task import Net, load_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, and say what it sent."""
    torch.manual_seed(0)
    strategy = FedAvg(fraction_train=context.run_config["fraction-train"], fraction_evaluate=0.0)
    strategy = CompressedStrategy(  # this one, and its codecs
        strategy, codec=fedq.build("codec", "dtcq", bits=1.0), downlink="lattice"
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
    sent = sum(t.uplink_bytes + t.downlink_bytes for t in strategy.traffic.values())
    whole = sum(t.float32_bytes for t in strategy.traffic.values())
    print(
        f"{sent:,} bytes of models and updates; {whole:,} as float32: {whole / sent:.1f} times less"
    )


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Return the global model's accuracy."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": test(net, load_data(0, 10)[1])})
