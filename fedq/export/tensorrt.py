"""ONNX for TensorRT (Jetson): signed activations with zero point 0, biases in float.

TensorRT takes no other zero point (NVIDIA/TensorRT#2774) and no uint8 (#2081). A network that was
trained with asymmetric ranges gets symmetric ones around them, up to twice as coarse: the gate
compares the file with that, and the report says what it costs in accuracy.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedq.export import _graph
from fedq.export._graph import Graph, Operator, Value
from fedq.export.base import Operators, require
from fedq.export.onnx import Onnx
from fedq.quantization.integer import IntegerGrid
from fedq.registry import register

_CLIPS = {"Relu", "Clip"}
_BOUNDS = {"QuantizeLinear", "DequantizeLinear", *_CLIPS}


@register("exporter", "tensorrt")
class TensorRt(Onnx):
    """ONNX with symmetric int8 activations, for TensorRT; checked by ONNX Runtime."""

    device: ClassVar[str] = "NVIDIA Jetson (TensorRT; executed here by ONNX Runtime only)"
    unsigned: ClassVar[bool] = False

    def adapt(self, graph: Graph) -> Graph:
        """Return the graph with all zero points 0."""
        moved: dict[Value, Value] = {}

        def move(value: Value) -> Value:
            if value not in moved:
                grid = symmetric(value.grid)
                moved[value] = (
                    value if grid == value.grid else dataclasses.replace(value, grid=grid)
                )
            return moved[value]

        operators: list[Operator] = []
        for op in graph.operators:
            changes: dict[str, Any] = {
                "inputs": tuple(move(value) for value in op.inputs),
                "output": move(op.output),
            }
            if isinstance(op, _graph.Conv | _graph.Linear):
                ratio = op.input.grid.scale / move(op.input).grid.scale
                bias = np.rint(op.weights.bias.astype(np.float64) * ratio).astype(np.int32)
                changes["weights"] = dataclasses.replace(op.weights, bias=bias)
            operators.append(dataclasses.replace(op, **changes))
        if all(value is new for value, new in moved.items()):
            return graph
        return Graph(move(graph.input), move(graph.output), tuple(operators))

    def operators(self, path: Path) -> Operators:
        """Count what TensorRT can fuse, from the file: it is not here to ask.

        That is an operator whose data are dequantized and whose output, perhaps clipped, is
        quantized; an operator that is not so bounded computes in float.
        """
        nodes = require("onnx", self).load(str(path)).graph.node
        source = {name: node for node in nodes for name in node.output}
        readers = {
            name: [n for n in nodes if name in n.input] for node in nodes for name in node.output
        }
        integer: Counter[str] = Counter()
        fallback: Counter[str] = Counter()
        for node in nodes:
            if node.op_type in _BOUNDS:
                continue
            whole = all(
                source[name].op_type == "DequantizeLinear" for name in node.input if name in source
            )
            after = readers[node.output[0]]
            while len(after) == 1 and after[0].op_type in _CLIPS:
                after = readers[after[0].output[0]]
            whole = whole and all(reader.op_type == "QuantizeLinear" for reader in after)
            (integer if whole and after else fallback)[node.op_type] += 1
        return Operators(dict(integer), dict(fallback))


def symmetric(grid: IntegerGrid) -> IntegerGrid:
    """Return the finest grid with zero point 0 and a narrow range that covers ``grid``.

    >>> symmetric(IntegerGrid(0.5, -128))
    IntegerGrid(scale=1.003937005996704, zero_point=0, smallest=-127, largest=127)
    """
    if grid.zero_point == 0:
        return grid
    reach = max(grid.largest - grid.zero_point, grid.zero_point - grid.smallest)
    return IntegerGrid(float(np.float32(grid.scale * reach / 127)), 0, -127, 127)
