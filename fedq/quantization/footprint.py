"""What a network's weights take on a device's storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedq.quantization.fake import WeightQuantizer


def footprint(model: nn.Module) -> dict[str, Any]:
    """Return the size of the deployed weights, and how many of them are zero.

    Quantized weights take their width, packed, and 4 bytes per scale; all other parameters 4 bytes
    each. What quantizers learned is in the scales.

    Returns:
      ``weight_bytes``, and ``zero_weights``, the share of zeros among the weights of layers.

    Example:
      >>> import fedq
      >>> network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
      >>> footprint(network)["weight_bytes"]
      184
      >>> footprint(fedq.build("quantization", "uniform").prepare(network))["weight_bytes"]
      88
    """
    size, zeros, weights = 0, 0, 0
    quantized: set[int] = set()
    for layer in model.modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        weight = getattr(layer, "weight", None)
        if isinstance(quantizer, WeightQuantizer):
            quantized.update(map(id, quantizer.parameters()))
        if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
            continue
        values = weight.detach()
        if isinstance(quantizer, WeightQuantizer) and quantizer.enabled:
            grid = quantizer.grid(weight)
            size += -(-quantizer.bits * weight.numel() // 8) + 4 * grid.scale.numel()
            quantized.add(id(weight))
            values = grid.multiples()
        zeros, weights = zeros + int((values == 0).sum()), weights + weight.numel()
    size += sum(4 * p.numel() for p in model.parameters() if id(p) not in quantized)
    return {"weight_bytes": size, "zero_weights": round(zeros / max(weights, 1), 6)}
