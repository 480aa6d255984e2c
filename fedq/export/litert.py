"""LiteRT (.tflite): int8 throughout, channels last, written with the runtime's own file schema.

The converter from torch (litert-torch) brings JAX along and quantizes by patterns of its own; the
graph is small and exact already, so it is written as it is: int8 input and output, per-channel
weights, int32 biases, no transposition. The same file serves phones, 64-bit boards, TFLite Micro
and the compiler of Coral.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.export import _graph
from fedq.export._graph import Activation, Graph, Operator, Value
from fedq.export.base import Exporter, Operators, require
from fedq.quantization.integer import IntegerGrid
from fedq.registry import register

#: Version of each operator's int8 form, as the runtime's registry numbers them.
_VERSIONS = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 4,
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "CONCATENATION": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "PAD": 2,
    "PADV2": 2,
    "QUANTIZE": 2,
    "RELU": 2,
    "RELU6": 2,
    "RESHAPE": 1,
    "STRIDED_SLICE": 2,
    "TRANSPOSE": 2,
}


@register("exporter", "litert")
class Litert(Exporter):
    """An int8 .tflite for LiteRT, one example at a time."""

    file: ClassVar[str] = "model.tflite"
    extra: ClassVar[str] = "export-litert"
    modules: ClassVar[tuple[str, ...]] = ("ai_edge_litert.interpreter", "flatbuffers")
    runtime: ClassVar[str] = "ai-edge-litert"
    device: ClassVar[str] = "64-bit boards such as a Raspberry Pi, phones (LiteRT)"
    layout: ClassVar[str] = "channels_last"

    def write(self, graph: Graph, path: Path, *, integer: bool) -> None:
        """Write the graph as one flat buffer."""
        path.write_bytes(self.content(graph, integer=integer))

    def content(self, graph: Graph, *, integer: bool) -> bytes:
        """Return the file."""
        return self._writer(graph, integer).run()

    def stored(self, graph: Graph) -> list[NDArray[np.int8]]:
        """Return the weights, channels last."""
        writer = self._writer(graph, integer=True)
        writer.run()
        return [writer.stored[op.output.name] for op in graph.weighted]

    def _writer(self, graph: Graph, integer: bool) -> _Writer:
        schema = require("ai_edge_litert.schema_py_generated", self)
        return _Writer(schema, require("flatbuffers", self), graph, integer)

    def operators(self, path: Path) -> Operators:
        """Count operators by the types of their tensors, as the file states them."""
        schema = require("ai_edge_litert.schema_py_generated", self)
        return count(schema, path.read_bytes())


def count(schema: Any, content: bytes) -> Operators:
    """Return the operators of a .tflite file; one that reads or writes floats is fall-back."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if name[0] != "_"}
    integer: Counter[str] = Counter()
    fallback: Counter[str] = Counter()
    (graph,) = model.subgraphs
    for op in graph.operators:
        name = names[model.operatorCodes[op.opcodeIndex].builtinCode]
        touched = [graph.tensors[i].type for i in (*op.inputs, *op.outputs) if i >= 0]
        whole = {schema.TensorType.INT8, schema.TensorType.INT32}.issuperset(touched)
        (integer if whole else fallback)[name] += 1
    return Operators(dict(integer), dict(fallback))


class _Writer:
    """Values of one or two extents are (1, height, width, channels); others are (1, features)."""

    def __init__(self, schema: Any, flatbuffers: Any, graph: Graph, integer: bool) -> None:
        self.schema, self.flatbuffers = schema, flatbuffers
        self.graph, self.integer = graph, integer
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, "fedq"
        self.model.operatorCodes = []
        self.model.buffers = [schema.BufferT()]  # the first one is nobody's
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.index: dict[Value, int] = {}
        self.codes: dict[str, int] = {}
        self.readers = {
            value: [op for op in graph.operators if value in op.inputs]
            for value in (graph.input, *(op.output for op in graph.operators))
        }
        #: Flattened values in channels-last order, and the shape that they had.
        self.shuffled: dict[Value, tuple[int, ...]] = {}
        #: Weights as they were written, by the name of what they compute.
        self.stored: dict[str, NDArray[np.int8]] = {}

    def run(self) -> bytes:
        self._value(self.graph.input)
        for op in self.graph.operators:
            self._operator(op)
        subgraph = self.schema.SubGraphT()
        subgraph.name, subgraph.tensors, subgraph.operators = "main", self.tensors, self.operators
        subgraph.inputs = [self.index[self.graph.input]]
        subgraph.outputs = [self.index[self.graph.output]]
        self.model.subgraphs = [subgraph]
        builder = self.flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _operator(self, op: Operator) -> None:
        schema = self.schema
        match op:
            case _graph.Conv():
                self._conv(op)
            case _graph.Linear():
                self._linear(op)
            case _graph.Add():
                options = schema.AddOptionsT()
                options.fusedActivationFunction = self._fused(op.activation)
                reads = [self.index[value] for value in op.inputs]
                self._emit("ADD", reads, self._value(op.output), options)
            case _graph.MaxPool():
                self._max_pool(op)
            case _graph.AveragePool():
                self._average_pool(op)
            case _graph.GlobalAverage():
                options = schema.ReducerOptionsT()
                options.keepDims = True
                axes = self._constant(f"{op.output.name}_axes", np.array([1, 2], np.int32))
                reads = [self.index[op.input], axes]
                self._emit("MEAN", reads, self._value(op.output), options)
            case _graph.Flatten():
                self._flatten(op)
            case _graph.LastStep():
                self._last_step(op)
            case _graph.Concat():
                options = schema.ConcatenationOptionsT()
                options.axis = len(_shape(op.output.shape)) - 1
                reads = [self.index[value] for value in op.inputs]
                self._emit("CONCATENATION", reads, self._value(op.output), options)
            case _graph.Requantize():
                self._requantize(op)
            case _:
                raise AssertionError(f"no LiteRT operator for {type(op).__name__}")

    # --- operators -----------------------------------------------------------------------------

    def _conv(self, op: _graph.Conv) -> None:
        channels = op.input.shape[0]
        depthwise = op.groups > 1
        if depthwise and op.groups != channels:
            raise ConfigError(
                f"cannot export {op.path}: LiteRT has no int8 kernel for {op.groups} groups of"
                f" {channels} channels; use groups=1 or one group per channel"
            )
        source, same = self._padded(op, op.padding, op.weights.values.shape[2:])
        # (out, in, height, width) -> (out, height, width, in), or (1, height, width, out)
        axes = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
        height, width = _extents(op.stride)
        options = (
            self.schema.DepthwiseConv2DOptionsT() if depthwise else self.schema.Conv2DOptionsT()
        )
        options.padding = self._padding(same)
        options.strideH, options.strideW = height, width
        options.dilationHFactor, options.dilationWFactor = _extents(op.dilation)
        options.fusedActivationFunction = self._fused(op.activation)
        if depthwise:
            options.depthMultiplier = len(op.weights.scales) // channels
        kernel = (1,) * (len(op.stride) == 1)

        def arrange(weight: NDArray[Any]) -> NDArray[Any]:
            shape = (*weight.shape[:2], *kernel, *weight.shape[2:])
            return weight.reshape(shape).transpose(axes)

        parameters = self._weights(
            op.output.name, op.weights, op.input.grid, arrange, 3 if depthwise else 0
        )
        kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        self._emit(kind, [source, *parameters], self._value(op.output), options)

    def _linear(self, op: _graph.Linear) -> None:
        options = self.schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = self._fused(op.activation)
        shape = self.shuffled.get(op.input)

        def arrange(weight: NDArray[Any]) -> NDArray[Any]:
            if shape is None:
                return weight
            columns = np.arange(weight.shape[1]).reshape(shape)
            return weight[:, np.moveaxis(columns, 0, -1).ravel()]

        parameters = self._weights(op.output.name, op.weights, op.input.grid, arrange, 0)
        reads = [self.index[op.input], *parameters]
        self._emit("FULLY_CONNECTED", reads, self._value(op.output), options)

    def _max_pool(self, op: _graph.MaxPool) -> None:
        lowest = float(np.finfo(np.float32).min)
        source, same = self._padded(op, op.padding, op.kernel, lowest)
        options = self._pool(op.kernel, op.stride, same)
        self._emit("MAX_POOL_2D", [source], self._value(op.output), options)

    def _average_pool(self, op: _graph.AveragePool) -> None:
        if not self.integer:
            options = self._pool(op.kernel, op.stride, same=False)
            reads = [self.index[op.input]]
            self._emit("AVERAGE_POOL_2D", reads, self._value(op.output), options)
            return
        self._conv(_graph.as_convolution(op))

    def _flatten(self, op: _graph.Flatten) -> None:
        source, shape = self.index[op.input], op.input.shape
        readers = self.readers[op.output]
        if min(shape[0], int(np.prod(shape[1:]))) > 1:  # else either order is the same
            if op.output is not self.graph.output and all(
                isinstance(reader, _graph.Linear) for reader in readers
            ):
                self.shuffled[op.output] = shape
            else:
                order = np.array([0, 3, 1, 2], np.int32)
                moved = self._tensor(
                    f"{op.output.name}_channels_first",
                    tuple(np.array(_shape(shape))[order]),
                    op.output.grid,
                )
                reads = [source, self._constant(f"{op.output.name}_order", order)]
                self._emit("TRANSPOSE", reads, moved, None)
                source = moved
        options = self.schema.ReshapeOptionsT()
        options.newShape = [1, *op.output.shape]
        new = self._constant(f"{op.output.name}_shape", np.array(options.newShape, np.int32))
        self._emit("RESHAPE", [source, new], self._value(op.output), options)

    def _last_step(self, op: _graph.LastStep) -> None:
        options = self.schema.StridedSliceOptionsT()
        _, height, length, channels = _shape(op.input.shape)
        bounds = {
            "start": [0, 0, length - 1, 0],
            "end": [1, height, length, channels],
            "stride": [1, 1, 1, 1],
        }
        constants = [
            self._constant(f"{op.output.name}_{key}", np.array(value, np.int32))
            for key, value in bounds.items()
        ]
        reads = [self.index[op.input], *constants]
        self._emit("STRIDED_SLICE", reads, self._value(op.output), options)

    def _requantize(self, op: _graph.Requantize) -> None:
        if op.activation == "none" and not self.integer:
            self.index[op.output] = self.index[op.input]
            return
        kind = {"none": "QUANTIZE", "relu": "RELU", "relu6": "RELU6"}[op.activation]
        self._emit(kind, [self.index[op.input]], self._value(op.output), None)

    def _padded(
        self,
        op: _graph.Conv | _graph.MaxPool,
        padding: _graph.Pairs,
        kernel: Sequence[int],
        fill: float | None = None,
    ) -> tuple[int, bool]:
        """Return the input to convolve, and whether the operator pads it itself ('SAME')."""
        source = self.index[op.input]
        if not any(map(any, padding)):
            return source, False
        dilation = op.dilation if isinstance(op, _graph.Conv) else (1,) * len(kernel)
        inside = zip(
            op.input.shape[1:], op.output.shape[1:], kernel, op.stride, dilation, strict=True
        )
        totals = [
            max((out - 1) * step + (size - 1) * spread + 1 - n, 0)
            for n, out, size, step, spread in inside
        ]
        strides = zip(op.input.shape[1:], op.output.shape[1:], op.stride, strict=True)
        if all(out == -(-n // step) for n, out, step in strides) and all(
            before == total // 2 for (before, _), total in zip(padding, totals, strict=True)
        ):
            return source, True
        whole = ((0, 0), *((0, 0),) * (len(kernel) == 1), *padding, (0, 0))
        shape = tuple(
            n + before + after
            for n, (before, after) in zip(_shape(op.input.shape), whole, strict=True)
        )
        name = f"{op.output.name}_padded"
        out = self._tensor(name, shape, op.input.grid)
        reads = [source, self._constant(f"{name}_by", np.array(whole, np.int32))]
        if fill is None:
            self._emit("PAD", reads, out, None)
        else:
            value: NDArray[Any] = np.array([fill], np.float32)
            if self.integer:
                value = np.array([op.input.grid.smallest], np.int8)
            grid = op.input.grid if self.integer else None
            self._emit("PADV2", [*reads, self._constant(f"{name}_with", value, grid)], out, None)
        return out, False

    # --- tensors -------------------------------------------------------------------------------

    def _value(self, value: Value) -> int:
        self.index[value] = self._tensor(value.name, _shape(value.shape), value.grid)
        return self.index[value]

    def _tensor(self, name: str, shape: tuple[int, ...], grid: IntegerGrid) -> int:
        kind = "INT8" if self.integer else "FLOAT32"
        scales = np.array([grid.scale], np.float32) if self.integer else None
        return self._add(name, shape, kind, 0, scales, grid.zero_point)

    def _constant(self, name: str, value: NDArray[Any], grid: IntegerGrid | None = None) -> int:
        scales = None if grid is None else np.array([grid.scale], np.float32)
        zero_point = 0 if grid is None else grid.zero_point
        kind = {"f": "FLOAT32", "i": f"INT{8 * value.itemsize}"}[value.dtype.kind]
        return self._add(name, value.shape, kind, self._buffer(value), scales, zero_point)

    def _weights(
        self, name: str, weights: _graph.Weights, source: IntegerGrid, arrange: Any, axis: int
    ) -> list[int]:
        if not self.integer:
            weight = self._constant(f"{name}_weight", arrange(weights.float_values))
            return [weight, self._constant(f"{name}_bias", weights.float_bias)]
        self.stored[name] = values = arrange(weights.values)
        bias_scales = (np.float32(source.scale) * weights.scales).astype(np.float32)
        buffers = self._buffer(values), self._buffer(weights.bias)
        return [
            self._add(
                f"{name}_weight", values.shape, "INT8", buffers[0], weights.scales, axis=axis
            ),
            self._add(f"{name}_bias", weights.bias.shape, "INT32", buffers[1], bias_scales),
        ]

    def _add(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: str,
        buffer: int,
        scales: NDArray[np.float32] | None = None,
        zero_point: int = 0,
        axis: int = 0,
    ) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, [int(n) for n in shape], buffer
        tensor.type = getattr(self.schema.TensorType, kind)
        if scales is not None:
            tensor.quantization = self.schema.QuantizationParametersT()
            tensor.quantization.scale = scales
            tensor.quantization.zeroPoint = np.full(len(scales), zero_point, np.int64)
            tensor.quantization.quantizedDimension = axis
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _buffer(self, value: NDArray[Any]) -> int:
        self.model.buffers.append(_aligned(self.schema, value))
        return len(self.model.buffers) - 1

    # --- parts ---------------------------------------------------------------------------------

    def _emit(self, kind: str, inputs: Sequence[int], output: int, options: Any) -> None:
        op = self.schema.OperatorT()
        op.opcodeIndex, op.inputs, op.outputs = self._code(kind), list(inputs), [output]
        if options is not None:
            op.builtinOptions = options
            name = type(options).__name__.removesuffix("T")
            op.builtinOptionsType = getattr(self.schema.BuiltinOptions, name)
        self.operators.append(op)

    def _code(self, kind: str) -> int:
        if kind not in self.codes:
            code = self.schema.OperatorCodeT()
            code.builtinCode = getattr(self.schema.BuiltinOperator, kind)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = _VERSIONS[kind] if self.integer else 1
            self.codes[kind] = len(self.codes)
            self.model.operatorCodes.append(code)
        return self.codes[kind]

    def _pool(self, kernel: Sequence[int], stride: Sequence[int], same: bool) -> Any:
        options = self.schema.Pool2DOptionsT()
        options.filterHeight, options.filterWidth = _extents(kernel)
        options.strideH, options.strideW = _extents(stride)
        options.padding = self._padding(same)
        return options

    def _padding(self, same: bool) -> int:
        padding = self.schema.Padding
        return int(padding.SAME if same else padding.VALID)

    def _fused(self, activation: Activation) -> int:
        name = {"none": "NONE", "relu": "RELU", "relu6": "RELU6"}[activation]
        return int(getattr(self.schema.ActivationFunctionType, name))


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor: channels last, series as images of height 1."""
    if len(shape) == 1:
        return (1, *shape)
    return (1, *_extents(shape[1:]), shape[0])


def _extents(values: Sequence[int]) -> tuple[int, int]:
    """Return height and width; a series has height 1, and steps of 1 there."""
    height, width = (1, *values)[-2:]
    return int(height), int(width)


def _aligned(schema: Any, value: NDArray[Any]) -> Any:
    """Return a buffer at a multiple of 16 bytes, as the format asks, so that devices map it."""

    class Aligned(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:  # noqa: N802 - the schema's name
            content = value.astype(value.dtype.newbyteorder("<")).tobytes()
            builder.StartVector(1, len(content), 16)
            builder.head -= len(content)
            builder.Bytes[builder.head : builder.head + len(content)] = content
            data = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    return Aligned()
