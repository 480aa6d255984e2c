"""The integer graph computed exactly: what every runtime is to agree with, up to a step.

Sums of products stay below 2^53, so that float64 holds them exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedq.export import _graph
from fedq.export._graph import Graph, Operator, Value, Weights, bounds
from fedq.quantization.integer import IntegerGrid

_BATCH = 100


def run(graph: Graph, x: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the integers of the logits, (n, classes), for inputs (n, *input_shape)."""
    grid = graph.input.grid
    start = torch.from_numpy(np.rint(x / np.float32(grid.scale)).astype(np.float64))
    values = {graph.input: _clip(start + grid.zero_point, grid.smallest, grid.largest)}
    for op in graph.operators:
        values[op.output] = _step(op, values)
    out: NDArray[np.int64] = values[graph.output].numpy().astype(np.int64)
    return out


def logits(graph: Graph, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits as numbers, in batches that bound memory."""
    grid = graph.output.grid
    parts = [run(graph, x[i : i + _BATCH]) for i in range(0, len(x), _BATCH)]
    return (np.float32(grid.scale) * (np.concatenate(parts) - grid.zero_point)).astype(np.float32)


def _step(op: Operator, values: dict[Value, Tensor]) -> Tensor:
    grid, source = op.output.grid, op.input.grid
    x = values[op.input]
    match op:
        case _graph.Flatten():
            return x.flatten(1)
        case _graph.MaxPool():
            pad = [n for pair in reversed(op.padding) for n in pair]
            x = functional.pad(x, pad, value=float(-(2**20)))
            pool = functional.max_pool1d if len(op.kernel) == 1 else functional.max_pool2d
            return pool(x, op.kernel, op.stride)
        case _graph.LastStep():
            return x[..., -1:]
        case _graph.Concat():
            return torch.cat([values[value] for value in op.inputs], 1)
        case _graph.Conv() | _graph.Linear():
            total = _accumulate(op, x - source.zero_point)
            factor = source.scale * op.weights.scales.astype(np.float64) / grid.scale
            total = total * torch.from_numpy(factor).reshape(-1, *[1] * (total.dim() - 2))
            return _round(total, grid, op.activation)
        case _graph.Add():
            reals = [
                value.grid.scale * (values[value] - value.grid.zero_point) for value in op.inputs
            ]
            return _round((reals[0] + reals[1]) / grid.scale, grid, op.activation)
        case _graph.AveragePool():
            average = functional.avg_pool1d if len(op.kernel) == 1 else functional.avg_pool2d
            mean = average(x - source.zero_point, op.kernel, op.stride)
            return _round(mean * (source.scale / grid.scale), grid)
        case _graph.GlobalAverage():
            mean = (x - source.zero_point).mean(tuple(range(2, x.dim())), keepdim=True)
            return _round(mean * (source.scale / grid.scale), grid)
        case _graph.Requantize():
            real = (x - source.zero_point) * (source.scale / grid.scale)
            return _round(real, grid, op.activation)
    raise AssertionError(f"no reference for {type(op).__name__}")


def _accumulate(op: _graph.Conv | _graph.Linear, x: Tensor) -> Tensor:
    weights: Weights = op.weights
    weight = torch.from_numpy(weights.values.astype(np.float64))
    bias = torch.from_numpy(weights.bias.astype(np.float64))
    if isinstance(op, _graph.Linear):
        return functional.linear(x, weight, bias)
    x = functional.pad(x, [n for pair in reversed(op.padding) for n in pair])
    convolve = functional.conv1d if len(op.stride) == 1 else functional.conv2d
    return convolve(x, weight, bias, op.stride, 0, op.dilation, op.groups)


def _round(steps: Tensor, grid: IntegerGrid, activation: _graph.Activation = "none") -> Tensor:
    return _clip(steps.round() + grid.zero_point, *bounds(activation, grid))


def _clip(x: Tensor, low: int, high: int) -> Tensor:
    return x.clamp(low, high)
