"""The work itself, by hand in torch: what every contestant but fedq runs for one client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

LEARNING_RATE, BATCH_SIZE = 0.1, 32


def network(model: str) -> nn.Module:
    """Return the network of 55,338 (small_cnn) or 25,450 parameters (mlp)."""
    if model == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1568, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    return net.to(memory_format=torch.channels_last)


def load_flat(net: nn.Module, weights: NDArray[np.float32]) -> None:
    """Set the parameters from one vector, in their order."""
    parameters = list(net.parameters())
    pieces = torch.from_numpy(weights.copy()).split([p.numel() for p in parameters])
    with torch.no_grad():
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.copy_(piece.view(parameter.shape))


def flat(state: dict[str, Tensor]) -> NDArray[np.float32]:
    """Return a state dict as one vector."""
    return np.concatenate([tensor.contiguous().numpy().ravel() for tensor in state.values()])


def images(x: NDArray[np.float32]) -> Tensor:
    """Return a client's images, channels last as the network wants them."""
    return torch.from_numpy(x).to(memory_format=torch.channels_last)


def train(net: nn.Module, x: Tensor, y: Tensor, order: Sequence[int] | Tensor) -> float:
    """One epoch of SGD over a client's examples in the given order; return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    net.train()
    total = 0.0
    for rows in torch.as_tensor(order).split(BATCH_SIZE):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(y)


def examples(arrays: dict[str, NDArray[Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return all clients' inputs and labels."""
    return [images(x) for x in arrays["x"]], [torch.from_numpy(y) for y in arrays["y"]]
