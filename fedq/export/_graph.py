"""One quantized graph for all runtimes: integer weights, int32 biases, a grid on every value.

It is what :func:`fedq.export._convert.convert` makes of a trained network and what every writer
reads. The float twin of the same network is in it, too, so that a writer makes both files from one
structure and their latencies compare. Plain NumPy; shapes are those of one example, channels first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedq.quantization.integer import LARGEST, IntegerGrid

Activation = Literal["none", "relu", "relu6"]
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that flows: its name, its shape for one example and its integer grid."""

    name: str
    shape: tuple[int, ...]
    grid: IntegerGrid


@dataclass(frozen=True, eq=False)
class Weights:
    """A layer's weight and bias, batch normalisation folded in, in integers and in float.

    Attributes:
      values: int8, output channels first.
      scales: (channels,) float32.
      bias: (channels,) int32, of scale ``input scale * scales``.
      bits: The width that holds every level, 2 to 8.
      spread: What the levels are multiplied by in ``values``: 127 for ternary weights.
      float_values: float32, of the float twin.
      float_bias: float32, of the float twin.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    bias: NDArray[np.int32]
    bits: int
    spread: int
    float_values: NDArray[np.float32]
    float_bias: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
    """A step of the graph; ``path`` is the module or call that it came from."""

    path: str
    inputs: tuple[Value, ...]
    output: Value

    @property
    def input(self) -> Value:
        """The first input."""
        return self.inputs[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv(Operator):
    """A convolution over one or two extents, zeros around it, with a fused activation."""

    weights: Weights
    stride: tuple[int, ...]
    padding: Pairs
    dilation: tuple[int, ...]
    groups: int
    activation: Activation


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear(Operator):
    """A dense layer with a fused activation."""

    weights: Weights
    activation: Activation


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Operator):
    """The sum of two values of one shape, with a fused activation."""

    activation: Activation


@dataclass(frozen=True, kw_only=True, eq=False)
class MaxPool(Operator):
    """The largest of each window, nothing around the input; input and output share the grid."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Pairs


@dataclass(frozen=True, kw_only=True, eq=False)
class AveragePool(Operator):
    """The mean of each window, no padding."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class GlobalAverage(Operator):
    """The mean over all extents, which stay with size 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Flatten(Operator):
    """All of an example in one axis, in channels-first order; the grid stays."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LastStep(Operator):
    """The last step of a series, which stays one of length 1; the grid stays."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Requantize(Operator):
    """The same value on another grid, with a fused activation."""

    activation: Activation


@dataclass(frozen=True, kw_only=True, eq=False)
class Concat(Operator):
    """Values one after the other along the channels, all on one grid."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A network in integers: operators in order of execution.

    Attributes:
      input: What the sensor gives, scaled as in training.
      output: The logits.
      operators: In order.
    """

    input: Value
    output: Value
    operators: tuple[Operator, ...]

    @property
    def weighted(self) -> list[Conv | Linear]:
        """The operators that hold weights."""
        return [op for op in self.operators if isinstance(op, Conv | Linear)]

    @property
    def multiplications(self) -> int:
        """Multiply-accumulates for one example."""
        total = 0
        for op in self.weighted:
            outputs = np.prod(op.output.shape[1:], dtype=int) if isinstance(op, Conv) else 1
            total += int(op.weights.values.size * outputs)
        return total

    @property
    def activation_bytes(self) -> int:
        """Bytes of all int8 values that live at once, at most: the least that an arena needs."""
        last = {value: i for i, op in enumerate(self.operators) for value in op.inputs}
        last[self.output] = len(self.operators)
        peak, live = 0, {self.input}
        for i, op in enumerate(self.operators):
            live.add(op.output)
            peak = max(peak, sum(int(np.prod(value.shape)) for value in live))
            live = {value for value in live if last.get(value, -1) > i}
        return peak


def as_convolution(op: AveragePool | GlobalAverage) -> Conv:
    """Return an average as a convolution of every channel with equal weights.

    It sums in integers and rounds once. Integer kernels for averages may keep their input's grid,
    which takes a second rounding, or be missing: then the runtime averages in float.
    """
    channels, *extents = op.input.shape
    kernel = op.kernel if isinstance(op, AveragePool) else tuple(extents)
    window = int(np.prod(kernel))
    weights = Weights(
        values=np.full((channels, 1, *kernel), LARGEST, np.int8),
        scales=np.full(channels, 1 / (LARGEST * window), np.float32),
        bias=np.zeros(channels, np.int32),
        bits=8,
        spread=1,
        float_values=np.full((channels, 1, *kernel), 1 / window, np.float32),
        float_bias=np.zeros(channels, np.float32),
    )
    return Conv(
        path=op.path,
        inputs=op.inputs,
        output=op.output,
        weights=weights,
        stride=op.stride if isinstance(op, AveragePool) else kernel,
        padding=pairs([0] * len(kernel)),
        dilation=(1,) * len(kernel),
        groups=channels,
        activation="none",
    )


def convolve_averages(graph: Graph, every: bool) -> Graph:
    """Return the graph with averages over windows and series, or all of them, as convolutions."""
    operators = [
        as_convolution(op)
        if isinstance(op, AveragePool)
        or (isinstance(op, GlobalAverage) and (every or len(op.input.shape) == 2))
        else op
        for op in graph.operators
    ]
    return Graph(graph.input, graph.output, tuple(operators))


def bounds(activation: Activation, grid: IntegerGrid) -> tuple[int, int]:
    """Return the smallest and largest integer that an operator with this activation gives."""
    low, high = grid.smallest, grid.largest
    if activation != "none":
        low = max(low, grid.zero_point)
    if activation == "relu6":
        high = min(high, grid.zero_point + round(6 / grid.scale))
    return low, high


def pairs(values: Sequence[int]) -> Pairs:
    """Return the same padding on both sides of each extent."""
    return tuple((int(n), int(n)) for n in values)
