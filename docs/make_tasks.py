"""What is made for docs/tasks.md: the table of the zoo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import _make
import torch
from _make import DOCS
from torch import nn

from fedq import build
from fedq.models.base import count_parameters, create
from fedq.quantization.footprint import footprint

PAGE = DOCS / "tasks.md"
#: Use, model, shape of an input, outputs, task and its metric, data.
ZOO = (
    ("keyword spotting", "ds_cnn", (1, 49, 10), 12, "classification", "speech_commands"),
    ("visual wake words", "mobilenet", (3, 96, 96), 2, "classification", "folder"),
    ("image classification", "resnet8", (3, 32, 32), 10, "classification", "huggingface"),
    ("classic MNIST net", "mnist_cnn", (1, 28, 28), 10, "classification", "mnist5k"),
    ("human activity", "imu_cnn", (6, 128), 6, "classification", "smartwatch"),
    ("anomaly detection", "autoencoder", (640,), 640, "reconstruction", "machine_sounds"),
    ("forecasting", "tcn", (1, 168), 24, "regression", "series_csv"),
)


def table() -> str:
    """Return the zoo as a Markdown table."""
    lines = [
        "| use | `model=` | input | parameters | MACs | float, kB | int8, kB | task | metric |"
        " `data=` |",
        "|---|---|---|---:|---:|---:|---:|---|---|---|",
    ]
    for use, model, shape, outputs, task, data in ZOO:
        network = create(build("model", model), shape, outputs)
        parameters = count_parameters(network)
        small = footprint(build("quantization", "uniform").prepare(network))["weight_bytes"]
        metric = build("task", task).metric.title
        lines.append(
            f"| {use} | `{model}` | {' x '.join(map(str, shape))} | {parameters:,}"
            f" | {multiplications(network, shape):,} | {4 * parameters / 1000:.1f}"
            f" | {small / 1000:.1f} | {task} | {metric} | `{data}` |"
        )
    return "\n".join(lines)


def multiplications(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the multiply-accumulates of layers with weights, for one example."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        weight = layer.get_parameter("weight")
        total += weight.numel() * (output[0].numel() // weight.shape[0])

    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    return total


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the page with the zoo of this version."""
    yield PAGE, _make.with_made(PAGE.read_text(), "table", table())
