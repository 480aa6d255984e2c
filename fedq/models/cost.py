"""What a network's training costs, in multiply-accumulates."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

#: A training step takes the forward pass, and as much again for the gradients of the inputs and of
#: the weights.
PASSES = 3


def layer_macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Return the multiply-accumulates of each layer for one example, forward, by name.

    Convolutions and linear layers count; normalisations, activations and the arithmetic of fake
    quantizers do not.

    Example:
      >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
      >>> layer_macs(network, (1, 4, 4))
      {'0': 144, '2': 32}
    """
    macs: dict[str, int] = {}

    def count(name: str, layer: Any, inputs: Any, output: torch.Tensor) -> None:
        each = (
            layer.in_features
            if isinstance(layer, nn.Linear)
            else (layer.in_channels // layer.groups * math.prod(layer.kernel_size))
        )
        macs[name] = macs.get(name, 0) + output.numel() * each

    network = copy.deepcopy(model).eval()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.register_forward_hook(partial(count, name))
    with torch.no_grad():
        network(torch.zeros(1, *input_shape))
    return macs


def training_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the multiply-accumulates of training on one example, forward and backward.

    Example:
      >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
      >>> training_macs(network, (1, 4, 4))
      528
    """
    return PASSES * sum(layer_macs(model, input_shape).values())
