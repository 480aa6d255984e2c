"""ExecuTorch (.pte) with everything in one XNNPACK delegate.

The graph becomes a torch program of quantize and dequantize operators with one dequantization per
reader and both again after a flattening: XNNPACK's partitioner otherwise splits the network, or
lowers the dense layer after a flattening to wrong numbers without a word.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedq.export import _graph
from fedq.export._graph import Activation, Graph, Operator, Value
from fedq.export.base import Exporter, Operators, require
from fedq.registry import register

_PARTITIONER = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
_SERIALIZE = "executorch.exir._serialize"
_XNNPACK = "executorch.backends.xnnpack.serialization"
#: What only moves values, or changes between integers and floats.
_MOVES = {"XNNConvert", "XNNStaticTranspose", "XNNStaticReshape", "XNNCopy"}


@register("exporter", "executorch")
class ExecuTorch(Exporter):
    """A .pte for XNNPACK; input and output are float32, channels first, one example."""

    file: ClassVar[str] = "model.pte"
    extra: ClassVar[str] = "export-executorch"
    modules: ClassVar[tuple[str, ...]] = ("executorch.exir", "executorch.runtime")
    runtime: ClassVar[str] = "executorch"
    device: ClassVar[str] = "Android and 64-bit boards (ExecuTorch, XNNPACK)"

    def write(self, graph: Graph, path: Path, *, integer: bool) -> None:
        """Write the program."""
        with _quiet():
            exir = require("executorch.exir", self)
            partitioner = importlib.import_module(_PARTITIONER).XnnpackPartitioner()
            example = (torch.zeros(1, *graph.input.shape),)
            program = torch.export.export(_Program(graph, integer).eval(), example, strict=False)
            lowered = exir.to_edge_transform_and_lower(
                program,
                partitioner=[partitioner],
                compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
            )
            path.write_bytes(lowered.to_executorch().buffer)

    def operators(self, path: Path) -> Operators:
        """Count the nodes of XNNPACK's graphs in the file by their outputs, and what stands apart.

        What no delegate took, apart from the conversion of input and output, is fall-back.
        """
        content = path.read_bytes()
        integer: Counter[str] = Counter()
        fallback: Counter[str] = Counter()
        with _quiet():
            program = importlib.import_module(f"{_SERIALIZE}._program")
            plan = program.deserialize_pte_binary(content).program.execution_plan[0]
            for operator in plan.operators:
                if "quantize" not in operator.name:
                    fallback[operator.name] += 1
            for index in range(len(plan.delegates)):
                payload = program._extract_delegate_payload(content, "xnnpack", index)
                for kind, whole in _nodes(payload):
                    if kind not in _MOVES:
                        (integer if whole else fallback)[kind.removeprefix("XNN")] += 1
        return Operators(dict(integer), dict(fallback))


class _Program(nn.Module):
    """The graph as a torch program."""

    def __init__(self, graph: Graph, integer: bool) -> None:
        super().__init__()
        if integer:  # XNNPACK has no int8 kernel for these
            graph = _graph.convolve_averages(graph, every=False)
        self.plan, self.integer = graph, integer
        if integer:
            importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers operators
        for i, op in enumerate(graph.operators):
            if isinstance(op, _graph.Conv | _graph.Linear):
                weights = op.weights
                self._constant(f"weight{i}", weights.values if integer else weights.float_values)
                self._constant(f"scales{i}", weights.scales)
                self._constant(f"zeros{i}", np.zeros(len(weights.scales), np.int64))
                bias = weights.bias * (weights.scales.astype(np.float64) * op.input.grid.scale)
                self._constant(
                    f"bias{i}", bias.astype(np.float32) if integer else weights.float_bias
                )

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)))

    def forward(self, x: Tensor) -> Tensor:
        """Compute."""
        values = {self.plan.input: self._quantize(x, self.plan.input)}
        for i, op in enumerate(self.plan.operators):
            reads = [self._dequantize(values[value], value) for value in op.inputs]
            values[op.output] = self._quantize(self._step(i, op, reads), op.output)
        return self._dequantize(values[self.plan.output], self.plan.output)

    def _step(self, i: int, op: Operator, reads: list[Tensor]) -> Tensor:
        x = reads[0]
        match op:
            case _graph.Conv():
                padding = [before for before, _ in op.padding]
                if any(before != after for before, after in op.padding):
                    x = functional.pad(x, [n for pair in reversed(op.padding) for n in pair])
                    padding = [0] * len(padding)
                convolve = functional.conv1d if len(op.stride) == 1 else functional.conv2d
                out = convolve(
                    x, self._weight(i), self._bias(i), op.stride, padding, op.dilation, op.groups
                )
                return _activated(out, op.activation)
            case _graph.Linear():
                out = functional.linear(x, self._weight(i), self._bias(i))
                return _activated(out, op.activation)
            case _graph.Add():
                return _activated(x + reads[1], op.activation)
            case _graph.MaxPool():
                padding = [before for before, _ in op.padding]
                pool = functional.max_pool1d if len(op.kernel) == 1 else functional.max_pool2d
                pooled: Tensor = pool(x, op.kernel, op.stride, padding)
                return pooled
            case _graph.AveragePool():
                average = functional.avg_pool1d if len(op.kernel) == 1 else functional.avg_pool2d
                return average(x, op.kernel, op.stride)
            case _graph.GlobalAverage():
                return x.mean(tuple(range(2, x.dim())), keepdim=True)
            case _graph.Flatten():
                return x.flatten(1)
            case _graph.LastStep():
                return x[..., -1:]
            case _graph.Concat():
                return torch.cat(reads, 1)
            case _graph.Requantize():
                return _activated(x, op.activation)
        raise AssertionError(f"no torch operator for {type(op).__name__}")

    def _quantize(self, x: Tensor, value: Value) -> Tensor:
        if not self.integer:
            return x
        out: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor.default(x, *_grid(value))
        return out

    def _dequantize(self, x: Tensor, value: Value) -> Tensor:
        if not self.integer:
            return x
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        out: Tensor = dequantize(x, *_grid(value))
        return out

    def _weight(self, i: int) -> Tensor:
        weight: Tensor = self.get_buffer(f"weight{i}")
        if self.integer:
            dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
            scales, zeros = self.get_buffer(f"scales{i}"), self.get_buffer(f"zeros{i}")
            weight = dequantize(weight, scales, zeros, 0, -127, 127, torch.int8)
        return weight

    def _bias(self, i: int) -> Tensor:
        return self.get_buffer(f"bias{i}")


def _grid(value: Value) -> tuple[float, int, int, int, torch.dtype]:
    grid = value.grid
    return grid.scale, grid.zero_point, grid.smallest, grid.largest, torch.int8


def _activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return x
    return functional.relu(x) if activation == "relu" else functional.hardtanh(x, 0.0, 6.0)


def _nodes(payload: bytes) -> Iterator[tuple[str, bool]]:
    """Yield each node of an XNNPACK graph: its kind, and whether its output is int8."""
    serialize = importlib.import_module(f"{_XNNPACK}.xnnpack_graph_serialize")
    flatbuffer = importlib.import_module(f"{_SERIALIZE}._flatbuffer")
    header = serialize.XNNHeader.from_bytes(payload[: serialize.XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schema.fbs").write_bytes(serialize._get_schema_bytes())
        (folder / "graph.bin").write_bytes(payload[start : start + header.flatbuffer_size])
        flatbuffer._flatc_decompile(
            str(folder), str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"]
        )
        text = (folder / "graph.json").read_text()
        graph = json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))
    kinds = {}
    for value in graph["xvalues"]:
        found = value["xvalue_union"]
        tensor = found.get("tensor_value", found)
        kinds[tensor["id_out"]] = tensor["datatype"]
    for node in graph["xnodes"]:
        output = node["xnode_union"]["output_id"]
        yield node["xnode_union_type"], kinds[output] == "xnn_datatype_qint8"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what importing and lowering say to themselves out of the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
