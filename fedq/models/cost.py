"""What a network's training costs, in multiply-accumulates."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

#: A training step takes the forward pass, and as much again for the gradients of the inputs and of
#: the weights.
PASSES = 3


def training_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the multiply-accumulates of training on one example, forward and backward.

    Convolutions and linear layers count; normalisations, activations and the arithmetic of fake
    quantizers do not.

    Example:
      >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
      >>> training_macs(network, (1, 4, 4))
      528
    """
    macs = 0

    def count(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(layer, nn.Linear):
            macs += output.numel() * layer.in_features
        elif isinstance(layer, nn.Conv1d | nn.Conv2d):
            macs += (
                output.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
            )

    network = copy.deepcopy(model).eval()
    for layer in network.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, *input_shape))
    return PASSES * macs
