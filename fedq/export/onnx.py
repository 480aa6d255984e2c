"""ONNX in QDQ form for ONNX Runtime: uint8 activations, opset 18.

Every operator stands between DequantizeLinear and QuantizeLinear nodes, which the runtime fuses
into its integer kernels. Activations are the trained int8 grid moved by 128: on x86 signed
activations run much slower. At opset 21 int8 activations do not load at all
(microsoft/onnxruntime#25526).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.export import _graph
from fedq.export._graph import Activation, Graph, Operator, Value
from fedq.export.base import Exporter, Operators, require
from fedq.registry import register

OPSET, _IR = 18, 8
#: Operators of ONNX Runtime that convert between integers and floats, and no others do.
_CONVERTS = {"QuantizeLinear", "DequantizeLinear"}


@register("exporter", "onnx")
class Onnx(Exporter):
    """ONNX with quantize and dequantize nodes, for ONNX Runtime.

    Input and output are float32, channels first, with a free batch dimension.
    """

    file: ClassVar[str] = "model.onnx"
    extra: ClassVar[str] = "export-onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    runtime: ClassVar[str] = "onnxruntime"
    device: ClassVar[str] = "64-bit boards and gateways (ONNX Runtime)"

    #: Whether activations are unsigned, and biases int32 of the accumulator's scale.
    unsigned: ClassVar[bool] = True

    def write(self, graph: Graph, path: Path, *, integer: bool) -> None:
        """Write the graph as one file, without names of files or stack traces."""
        onnx = require("onnx", self)
        path.write_bytes(_Writer(onnx, graph, integer, self.unsigned).model().SerializeToString())

    def stored(self, graph: Graph) -> list[NDArray[np.int8]]:
        """Return the weights as they are."""
        return [op.weights.values for op in graph.weighted]

    def operators(self, path: Path) -> Operators:
        """Count the operators of the graph as ONNX Runtime optimises it."""
        onnx, runtime = require("onnx", self), require("onnxruntime", self)
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        optimised = path.with_name(f"{path.stem}_optimised.onnx")
        options.optimized_model_filepath = str(optimised)
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(str(optimised))
        optimised.unlink()
        return _count(model.graph)


def _count(graph: Any) -> Operators:
    """A node computes in float if it reads the input, what was dequantized or computed in float."""
    floats = {value.name for value in graph.input}
    integer: Counter[str] = Counter()
    fallback: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            floats.update(node.output)
        elif node.op_type in _CONVERTS:
            continue
        elif floats.intersection(node.input):
            fallback[node.op_type] += 1
            floats.update(node.output)
        else:
            integer[node.op_type] += 1
    return Operators(dict(integer), dict(fallback))


class _Writer:
    def __init__(self, onnx: Any, graph: Graph, integer: bool, unsigned: bool) -> None:
        self.helper, self.numpy, self.onnx = onnx.helper, onnx.numpy_helper, onnx
        self.graph, self.integer, self.unsigned = graph, integer, unsigned
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.uses: Counter[str] = Counter()

    def model(self) -> Any:
        source, result = self.graph.input, self.graph.output
        self._quantize(source, source.name)
        for op in self.graph.operators:
            self._operator(op)
        name = self._read(result)
        if self.integer:
            self.nodes[-1].output[0] = "logits"
        else:
            self._node("Identity", [name], "logits")
        inputs = [self._tensor(source.name, source.shape)]
        graph = self.helper.make_graph(
            self.nodes, "fedq", inputs, [self._tensor("logits", result.shape)], self.constants
        )
        opsets = [self.helper.make_opsetid("", OPSET)]
        model = self.helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR, producer_name="fedq"
        )
        self.onnx.checker.check_model(model, full_check=True)
        return model

    def _operator(self, op: Operator) -> None:
        reads = [self._read(value) for value in op.inputs]
        activation: Activation = "none"
        match op:
            case _graph.Conv():
                reads += self._weights(op)
                attributes = {
                    "strides": op.stride,
                    "pads": _pads(op.padding),
                    "dilations": op.dilation,
                    "group": op.groups,
                    "kernel_shape": op.weights.values.shape[2:],
                }
                kind, activation = "Conv", op.activation
            case _graph.Linear():
                reads += self._weights(op)
                kind, activation, attributes = "Gemm", op.activation, {"transB": 1}
            case _graph.Add():
                kind, activation, attributes = "Add", op.activation, {}
            case _graph.MaxPool():
                attributes = {
                    "kernel_shape": op.kernel,
                    "strides": op.stride,
                    "pads": _pads(op.padding),
                }
                kind = "MaxPool"
            case _graph.AveragePool():
                kind = "AveragePool"
                attributes = {"kernel_shape": op.kernel, "strides": op.stride}
            case _graph.GlobalAverage():
                kind, attributes = "GlobalAveragePool", {}
            case _graph.Flatten():
                kind, attributes = "Flatten", {"axis": 1}
            case _graph.LastStep():
                length = op.input.shape[1]
                name = op.output.name
                reads += [
                    self._constant(f"{name}_{key}", np.array([value], np.int64))
                    for key, value in (("start", length - 1), ("end", length), ("axis", 2))
                ]
                kind, attributes = "Slice", {}
            case _graph.Concat():
                kind, attributes = "Concat", {"axis": 1}
            case _graph.Requantize():
                kind, activation, attributes = "Identity", op.activation, {}
            case _:
                raise AssertionError(f"no ONNX operator for {type(op).__name__}")
        out = f"{op.output.name}_computed"
        if kind == "Identity":
            out = reads[0]
        else:
            self._node(kind, reads, out, **attributes)
        if activation == "relu":
            out = self._node("Relu", [out], f"{out}_relu")
        elif activation == "relu6":
            limits = [self._constant(f"{out}_{n}", np.float32(n)) for n in (0, 6)]
            out = self._node("Clip", [out, *limits], f"{out}_relu6")
        self._quantize(op.output, out)

    # --- values --------------------------------------------------------------------------------

    def _quantize(self, value: Value, source: str) -> None:
        """Let a float tensor become the value."""
        if not self.integer:
            if source != value.name:
                self._node("Identity", [source], value.name)
            return
        self._node("QuantizeLinear", [source, *self._grid(value)], self._integers(value))

    def _read(self, value: Value) -> str:
        """Return a float tensor of the value, for one reader alone."""
        if not self.integer:
            return value.name
        self.uses[value.name] += 1
        out = f"{value.name}_read{self.uses[value.name]}"
        return self._node("DequantizeLinear", [self._integers(value), *self._grid(value)], out)

    def _integers(self, value: Value) -> str:
        return f"{value.name}_integers"

    def _grid(self, value: Value) -> tuple[str, str]:
        zero = value.grid.zero_point
        integers = np.uint8(zero + 128) if self.unsigned else np.int8(zero)
        scale = np.float32(value.grid.scale)
        return self._constant(f"{value.name}_scale", scale), self._constant(
            f"{value.name}_zero", integers
        )

    def _weights(self, op: _graph.Conv | _graph.Linear) -> list[str]:
        name, weights = op.output.name, op.weights
        if not self.integer:
            return [
                self._constant(f"{name}_weight", weights.float_values),
                self._constant(f"{name}_bias", weights.float_bias),
            ]
        zeros = np.zeros(weights.scales.shape, np.int8)
        weight = [
            self._constant(f"{name}_weight_integers", weights.values),
            self._constant(f"{name}_weight_scales", weights.scales),
            self._constant(f"{name}_weight_zeros", zeros),
        ]
        weight_name = self._node("DequantizeLinear", weight, f"{name}_weight", axis=0)
        scales = (np.float32(op.input.grid.scale) * weights.scales).astype(np.float32)
        if not self.unsigned:  # TensorRT takes biases in float
            bias = weights.bias.astype(np.float64) * scales.astype(np.float64)
            return [weight_name, self._constant(f"{name}_bias", bias.astype(np.float32))]
        parts = [
            self._constant(f"{name}_bias_integers", weights.bias),
            self._constant(f"{name}_bias_scales", scales),
            self._constant(f"{name}_bias_zeros", np.zeros(scales.shape, np.int32)),
        ]
        return [weight_name, self._node("DequantizeLinear", parts, f"{name}_bias", axis=0)]

    # --- parts ---------------------------------------------------------------------------------

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in attributes.items()}
        self.nodes.append(self.helper.make_node(kind, list(inputs), [output], **plain))
        return output

    def _constant(self, name: str, value: Any) -> str:
        if all(constant.name != name for constant in self.constants):
            self.constants.append(self.numpy.from_array(np.asarray(value), name))
        return name

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        kind = self.onnx.TensorProto.FLOAT
        return self.helper.make_tensor_value_info(name, kind, ["batch", *shape])


def _pads(padding: _graph.Pairs) -> list[int]:
    return [before for before, _ in padding] + [after for _, after in padding]
