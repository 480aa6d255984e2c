"""Model, data and training: nothing here knows of Flower or fedq."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small convolutional network for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, (n, 10)."""
        x = functional.max_pool2d(functional.relu(self.norm(self.conv1(x))), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


def load_data(partition: int, partitions: int) -> tuple[DataLoader, DataLoader]:
    """Return training batches of one partition, and the test set's."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(y)
    order = np.random.default_rng(0).permutation(len(y))
    own = order[297:][partition::partitions]
    train = DataLoader(TensorDataset(images[own], labels[own]), batch_size=16, shuffle=True)
    test = DataLoader(TensorDataset(images[order[:297]], labels[order[:297]]), batch_size=64)
    return train, test


def train(net: nn.Module, batches: DataLoader, epochs: int, lr: float) -> float:
    """Train in place; return the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for x, y in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(batches)


def test(net: nn.Module, batches: DataLoader) -> float:
    """Return the accuracy."""
    net.eval()
    with torch.no_grad():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
    return right / len(batches.dataset)
