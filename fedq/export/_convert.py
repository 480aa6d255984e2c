"""From the trained network with fake quantizers to integers; batch normalisation folds exactly.

A raw weight ``w = q s`` under ``gain (conv(x, w) + b - mean) / deviation + shift`` is, with
``k = gain / deviation``, the weight ``sign(k) q`` of scale ``s |k|`` and the bias
``k (b - mean) + shift``: the same integers up to sign, which the narrow range is closed under.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from fedq.errors import ConfigError
from fedq.export import _graph
from fedq.export._graph import Activation, Graph, Operator, Pairs, Value, Weights, pairs
from fedq.quantization.integer import IntegerGrid, activation_grid, integer_weight
from fedq.quantization.placement import ACTIVATIONS, PreparedModel

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_GLOBAL = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_KEEPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Identity)
_RELU: dict[Any, Activation] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.relu: "relu",
    functional.relu6: "relu6",
    "relu": "relu",
    "relu_": "relu",
}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FLATTEN = {torch.flatten, "flatten", "view", "reshape", torch.reshape}
_CONCAT = {torch.cat, torch.concat}
_MEAN = {torch.mean, "mean"}

#: What to do about what has no integer kernel, by kind.
_PER_EXAMPLE = (
    "statistics of each example do not fold into a layer; train with model.norm=batch, local or"
    " frozen, or with batch normalisation in a model of your own"
)
_REMEDIES = dict.fromkeys(
    ("GroupNorm", "LayerNorm", "InstanceNorm1d", "InstanceNorm2d", "group_norm", "layer_norm"),
    _PER_EXAMPLE,
)
#: The smallest factor between an accumulator and an output step that kernels can hold (XNNPACK).
_SMALLEST_FACTOR = 2.0**-31
_LARGEST_BIAS = 2.0**30


def convert(model: nn.Module, input_shape: Sequence[int]) -> Graph:
    """Return the integer graph of a trained network with fake quantizers.

    Args:
      model: As :meth:`fedq.quantization.Quantization.prepare` returns it, trained.
      input_shape: One example, channels first.

    Raises:
      ConfigError: If the network computes what has no integer kernel (named with the module's
        path), a range is unset, a weight is not finite or has no integer form.
    """
    if not isinstance(model, PreparedModel) or not hasattr(model, ACTIVATIONS):
        raise ConfigError(
            "the model has float activations: an int8 export needs their ranges; calibrate with"
            " --calibrate N, or train with quantization=int8"
        )
    return _Converter(model.eval(), tuple(input_shape)).run()


def with_device_biases(model: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """Return a copy of a network with fake quantizers whose biases are those of its integer graph.

    Devices hold biases as int32 multiples of the products of steps. That is all that tells the
    integers from training: this copy, in float64, gives their outputs exactly, but for ties. In
    float32 it would not be as near, as sums, scales and biases are rounded once more.

    Args:
      model: As for :func:`convert`.
      input_shape: One example, channels first.
    """
    twin = copy.deepcopy(model).eval()
    assert isinstance(twin, PreparedModel)
    converter = _Converter(twin, tuple(input_shape))
    graph = converter.run()
    exact = {op.path: _exact(twin.get_submodule(op.path), op.path) for op in graph.weighted}
    twin.double()
    with torch.no_grad():
        for op in graph.weighted:
            layer, norm = twin.get_submodule(op.path), converter.norms[op.path]
            layer.weight = nn.Parameter(exact[op.path])
            layer.weight_quantizer.enabled = False  # type: ignore[union-attr]
            gain, bias = _folded(layer, norm)
            held = op.weights.bias * (op.input.grid.scale * op.weights.scales.astype(np.float64))
            moved = torch.from_numpy(held - bias)
            if isinstance(norm, _BATCH_NORMS) and not norm.affine:
                assert norm.running_mean is not None
                norm.running_mean -= moved / torch.from_numpy(gain)
            elif (shift := (norm or layer).bias) is not None:
                assert isinstance(shift, Tensor)
                shift += moved
    return twin


def _exact(layer: nn.Module, path: str) -> Tensor:
    """Return a layer's fake-quantized weight in float64: its integers times their scale."""
    weight = integer_weight(layer, path)
    scales = weight.scales.reshape(-1, *[1] * (weight.values.ndim - 1))
    return torch.from_numpy(weight.values * scales)


class _Converter:
    def __init__(self, model: PreparedModel, input_shape: tuple[int, ...]) -> None:
        self.module = fx.GraphModule(model, model.graph)
        self.nodes: list[fx.Node] = list(self.module.graph.nodes)
        self.shapes = _shapes(self.module, input_shape)
        self.values: dict[fx.Node, Value] = {}
        #: Zeros around a value that is not padded yet: the convolutions behind it do that.
        self.zeros: dict[fx.Node, Pairs] = {}
        self.operators: list[Operator] = []
        #: The normalisation that is folded into each layer, by the layer's path.
        self.norms: dict[str, nn.Module | None] = {}
        self.done: set[fx.Node] = set()

    def run(self) -> Graph:
        inputs = [node for node in self.nodes if node.op == "placeholder" and node.users]
        if len(inputs) != 1:
            raise ConfigError(f"cannot export a network of {len(inputs)} inputs; give it one")
        self.done.add(inputs[0])
        source = Value("input", self.shapes[inputs[0]], self._grid_after(inputs))
        self._name(inputs[0], source)
        for node in self.nodes:
            if node.op == "output":
                (result,) = node.all_input_nodes
                return Graph(source, self._value(result), tuple(self.operators))
            if node not in self.done:
                self._convert(node)
        raise AssertionError("a graph ends with an output")

    # --- nodes -------------------------------------------------------------------------------

    def _convert(self, node: fx.Node) -> None:
        module, target = self._module(node), node.target
        emit: Callable[[fx.Node, list[fx.Node]], None]
        if node.op == "get_attr" or node.op == "placeholder":
            return
        if isinstance(module, _KEEPS):
            self._name(node, self._value(node.all_input_nodes[0]))
        elif isinstance(module, nn.MaxPool1d | nn.MaxPool2d):
            self._name(node, self._max_pool(node, self._value(node.all_input_nodes[0])))
        elif isinstance(module, nn.Flatten) or target in _FLATTEN:
            self._flatten(node)
        elif isinstance(module, nn.ZeroPad1d | nn.ZeroPad2d):
            self._pad(node)
        elif target is operator.getitem:
            self._last_step(node)
        else:
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                emit = self._layer
            elif target in _ADD and len(node.all_input_nodes) == 2:
                emit = self._add
            elif self._relu(node):
                emit = self._activation
            elif isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
                emit = self._average
            elif isinstance(module, _GLOBAL) or target in _MEAN:
                emit = self._mean
            elif target in _CONCAT:
                emit = self._concat
            else:
                raise self._unsupported(node)
            emit(node, self._chain(node))

    def _layer(self, node: fx.Node, chain: list[fx.Node]) -> None:
        layer = self._module(node)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)
        norm = next((m for n in chain if isinstance(m := self._module(n), _BATCH_NORMS)), None)
        self.norms[str(node.target)] = norm
        source = self._value(node.all_input_nodes[0])
        output = self._output(chain)
        weights = _weights(layer, str(node.target), norm, source.grid, output.grid)
        common: dict[str, Any] = {"path": str(node.target), "inputs": (source,), "output": output}
        activation = self._fused(chain)
        if isinstance(layer, nn.Linear):
            if len(source.shape) != 1:
                raise self._unsupported(node, f"on inputs of shape {source.shape}; flatten them")
            self.operators.append(_graph.Linear(weights=weights, activation=activation, **common))
        else:
            if layer.padding_mode != "zeros":
                raise self._unsupported(node, f"with padding_mode={layer.padding_mode}")
            self.operators.append(
                _graph.Conv(
                    weights=weights,
                    stride=tuple(layer.stride),
                    padding=_around(_padding(layer), self.zeros.get(node.all_input_nodes[0], ())),
                    dilation=tuple(layer.dilation),
                    groups=layer.groups,
                    activation=activation,
                    **common,
                )
            )
        self._finish(chain, output)

    def _add(self, node: fx.Node, chain: list[fx.Node]) -> None:
        inputs = tuple(self._value(n) for n in node.all_input_nodes)
        if inputs[0].shape != inputs[1].shape or node.kwargs.get("alpha", 1) != 1:
            raise self._unsupported(node, "of values of different shapes")
        output, activation = self._output(chain), self._fused(chain)
        self.operators.append(
            _graph.Add(path=node.name, inputs=inputs, output=output, activation=activation)
        )
        self._finish(chain, output)

    def _activation(self, node: fx.Node, chain: list[fx.Node]) -> None:
        output, inputs = self._output(chain), (self._value(node.all_input_nodes[0]),)
        self.operators.append(
            _graph.Requantize(
                path=self._path(node), inputs=inputs, output=output, activation=self._fused(chain)
            )
        )
        self._finish(chain, output)

    def _average(self, node: fx.Node, chain: list[fx.Node]) -> None:
        module = self._module(node)
        assert isinstance(module, nn.AvgPool1d | nn.AvgPool2d)
        extents = len(self.shapes[node]) - 1
        if any(_tuple(module.padding, extents)) or module.ceil_mode:
            raise self._unsupported(node, "with padding or ceil_mode")
        if getattr(module, "divisor_override", None) is not None:
            raise self._unsupported(node, "with divisor_override")
        self._plain(node, chain)
        output = self._output(chain)
        self.operators.append(
            _graph.AveragePool(
                path=self._path(node),
                inputs=(self._value(node.all_input_nodes[0]),),
                output=output,
                kernel=_tuple(module.kernel_size, extents),
                stride=_tuple(module.stride, extents),
            )
        )
        self._finish(chain, output)

    def _mean(self, node: fx.Node, chain: list[fx.Node]) -> None:
        source = self._value(node.all_input_nodes[0])
        extents = len(source.shape) - 1
        module, keep = self._module(node), True
        if module is not None:
            whole = set(_tuple(module.output_size, extents)) == {1}
        else:
            where = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            axes = _tuple(where, extents) if where is not None else ()
            rank = extents + 2
            whole = sorted(int(a) % rank for a in axes) == list(range(2, rank))
            given = node.args[2] if len(node.args) > 2 else False
            keep = bool(node.kwargs.get("keepdim", given))
        if not whole or not extents:
            raise self._unsupported(node, "over less than all extents; use AvgPool")
        self._plain(node, chain)
        output = self._output(chain)
        if keep:
            mean = output
        else:
            mean = Value(f"{output.name}_mean", (*output.shape, *[1] * extents), output.grid)
        path = self._path(node)
        self.operators.append(_graph.GlobalAverage(path=path, inputs=(source,), output=mean))
        if not keep:
            self.operators.append(_graph.Flatten(path=path, inputs=(mean,), output=output))
        self._finish(chain, output)

    def _concat(self, node: fx.Node, chain: list[fx.Node]) -> None:
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        rank = len(self.shapes[node]) + 1
        if not isinstance(axis, int) or axis % rank != 1:
            raise self._unsupported(node, "along another axis than channels")
        self._plain(node, chain)
        output = self._output(chain)
        inputs = []
        for i, part in enumerate(self._value(n) for n in node.all_input_nodes):
            moved = Value(f"{output.name}_part{i}", part.shape, output.grid)
            self.operators.append(
                _graph.Requantize(
                    path=self._path(node), inputs=(part,), output=moved, activation="none"
                )
            )
            inputs.append(moved)
        self.operators.append(
            _graph.Concat(path=self._path(node), inputs=tuple(inputs), output=output)
        )
        self._finish(chain, output)

    def _flatten(self, node: fx.Node) -> None:
        source, shape = self._value(node.all_input_nodes[0]), self.shapes[node]
        if len(shape) != 1:
            raise self._unsupported(node, f"to shape {shape}; only flattening is")
        if source.shape == shape:
            self._name(node, source)
            return
        output = Value(node.name, shape, source.grid)
        self.operators.append(
            _graph.Flatten(path=self._path(node), inputs=(source,), output=output)
        )
        self._name(node, output)

    def _pad(self, node: fx.Node) -> None:
        """Leave zeros to the convolutions that read them: they are on every grid."""
        for user in node.users:
            if not isinstance(self._module(user), _CONVOLUTIONS):
                raise self._unsupported(node, "before anything but convolutions")
        module = self._module(node)
        assert isinstance(module, nn.ZeroPad1d | nn.ZeroPad2d)
        sides = [int(n) for n in module.padding]
        if min(sides) < 0:
            raise self._unsupported(node, "that crops")
        pad = tuple(zip(sides[-2::-2], sides[::-2], strict=True))  # last extent first in torch
        self._name(node, self._value(node.all_input_nodes[0]))
        self.zeros[node] = pad

    def _last_step(self, node: fx.Node) -> None:
        (source,), index = node.all_input_nodes, node.args[1]
        value = self._value(source)
        rest: tuple[Any, ...] = (slice(None), slice(None))
        if len(value.shape) != 2 or index not in ((..., -1), (*rest, -1)):
            raise self._unsupported(node, "of anything but a series' last step")
        path = self._path(node)
        last = Value(f"{node.name}_step", (value.shape[0], 1), value.grid)
        output = Value(node.name, self.shapes[node], value.grid)
        self.operators.append(_graph.LastStep(path=path, inputs=(value,), output=last))
        self.operators.append(_graph.Flatten(path=path, inputs=(last,), output=output))
        self._name(node, output)

    def _max_pool(self, node: fx.Node, source: Value) -> Value:
        module = self._module(node)
        assert isinstance(module, nn.MaxPool1d | nn.MaxPool2d)
        extents = len(source.shape) - 1
        if set(_tuple(module.dilation, extents)) != {1} or module.ceil_mode:
            raise self._unsupported(node, "with dilation or ceil_mode")
        output = Value(node.name, self.shapes[node], source.grid)
        self.operators.append(
            _graph.MaxPool(
                path=self._path(node),
                inputs=(source,),
                output=output,
                kernel=_tuple(module.kernel_size, extents),
                stride=_tuple(module.stride, extents),
                padding=pairs(_tuple(module.padding, extents)),
            )
        )
        return output

    # --- chains ------------------------------------------------------------------------------

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes from ``node`` to its quantizer, which is left out."""
        chain = [node]
        while True:
            users = list(chain[-1].users)
            if any(self._quantizer(user) for user in users):
                return chain
            if len(users) != 1:
                raise ConfigError(f"{self._path(chain[-1])} has no activation quantizer")
            module = self._module(users[0])
            if not (
                (isinstance(module, _BATCH_NORMS) and len(chain) == 1)
                or isinstance(module, nn.MaxPool1d | nn.MaxPool2d)
                or self._relu(users[0])
            ):
                raise self._unsupported(users[0])
            chain.append(users[0])

    def _output(self, chain: list[fx.Node]) -> Value:
        """Return the value of a chain before its pools: the maximum commutes with rounding."""
        shape = self.shapes[chain[0]]
        return Value(chain[0].name, shape, self._grid_after(chain))

    def _finish(self, chain: list[fx.Node], value: Value) -> None:
        self.done.update(chain)
        for node in chain:
            if isinstance(self._module(node), nn.MaxPool1d | nn.MaxPool2d):
                value = self._max_pool(node, value)
        self._name(chain[-1], value)

    def _fused(self, chain: list[fx.Node]) -> Activation:
        kinds = {self._relu(node) for node in chain} - {None}
        if getattr(self._quantizer_of(chain), "rectifies", False):  # a ReLU that it took over
            kinds.add("relu")
        return "relu6" if "relu6" in kinds else "relu" if kinds else "none"

    def _plain(self, node: fx.Node, chain: list[fx.Node]) -> None:
        if len(chain) > 1:
            raise self._unsupported(chain[1], f"right after {self._path(node)}")

    def _name(self, node: fx.Node, value: Value) -> None:
        """Let a node, and the quantizers behind it, stand for a value."""
        self.values[node] = value
        for user in node.users:
            if self._quantizer(user):
                self.values[user] = value
                self.done.add(user)

    def _grid_after(self, chain: list[fx.Node]) -> IntegerGrid:
        return activation_grid(self._quantizer_of(chain), self._path(chain[-1]))

    def _quantizer_of(self, chain: list[fx.Node]) -> nn.Module:
        for user in chain[-1].users:
            if self._quantizer(user):
                return self.module.get_submodule(str(user.target))
        raise ConfigError(f"{self._path(chain[-1])} has no activation quantizer")

    # --- what a node is ----------------------------------------------------------------------

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _quantizer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target).startswith(f"{ACTIVATIONS}.")

    def _relu(self, node: fx.Node) -> Activation | None:
        module = self._module(node)
        if isinstance(module, nn.ReLU6):
            return "relu6"
        if isinstance(module, nn.ReLU):
            return "relu"
        return _RELU.get(node.target) if module is None else None

    def _value(self, node: fx.Node) -> Value:
        if node not in self.values:
            raise self._unsupported(node)
        return self.values[node]

    def _path(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _unsupported(self, node: fx.Node, how: str = "") -> ConfigError:
        module = self._module(node)
        named = type(module) if module else node.target
        kind = str(getattr(named, "__name__", named))
        if module is None:
            owners = list((node.meta.get("nn_module_stack") or {}).values())
            owner = owners[-1][0] if owners and owners[-1][0] else "the network's forward"
            where = f"a call of {kind} in {owner}"
        else:
            where = f"{node.target} ({kind})"
        why = _REMEDIES.get(kind, "it has no integer kernel in every runtime")
        return ConfigError(
            f"cannot export {where}{' ' + how if how else ''}: {why}; docs/export.md lists what has"
            " an integer form"
        )


def _shapes(module: fx.GraphModule, input_shape: tuple[int, ...]) -> dict[fx.Node, tuple[int, ...]]:
    """Return the shape of every tensor for one example."""
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n] = tuple(result.shape[1:])
            return result

    with torch.no_grad():
        Shapes(module).run(torch.zeros(1, *input_shape))
    return shapes


def _weights(
    layer: nn.Conv1d | nn.Conv2d | nn.Linear,
    path: str,
    norm: nn.Module | None,
    source: IntegerGrid,
    output: IntegerGrid,
) -> Weights:
    integer = integer_weight(layer, path)
    if norm is not None and getattr(norm, "running_mean", None) is None:
        raise ConfigError(f"the batch normalisation after {path} has no running statistics to fold")
    gain, bias = _folded(layer, norm)
    if not (np.isfinite(gain).all() and np.isfinite(bias).all()):
        raise ConfigError(f"the bias or normalisation of {path} is not finite; train again")
    shape = (-1, *[1] * (integer.values.ndim - 1))
    # Coarse levels on a finer step: the same weights, and a bias that is not rounded to products of
    # coarse steps, which may be several output steps each.
    spread = integer.spread
    # What a channel adds below these steps no kernel can show; it rounds on a coarser grid.
    floor = np.maximum(
        output.scale / source.scale * _SMALLEST_FACTOR,
        np.abs(bias) / (source.scale * _LARGEST_BIAS),
    )
    exact = integer.scales / spread * np.abs(gain)
    scales = np.maximum(exact, floor).astype(np.float32).astype(np.float64)
    sign = np.where(gain < 0, -1.0, 1.0)
    coarser = np.where(exact >= floor, 1.0, exact / scales)
    values = integer.values * float(spread) * (sign * coarser).reshape(shape)
    weight = _array(layer.weight) * gain.reshape(shape)
    return Weights(
        values=np.rint(values).astype(np.int8),
        scales=scales.astype(np.float32),
        bias=np.rint(bias / (source.scale * scales)).astype(np.int32),
        bits=integer.bits,
        spread=spread,
        float_values=weight.astype(np.float32),
        float_bias=bias.astype(np.float32),
    )


def _folded(layer: Any, norm: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what a layer's normalisation multiplies it by, and the bias of both together."""
    channels = len(layer.weight)
    bias = np.zeros(channels) if layer.bias is None else _array(layer.bias)
    if norm is None:
        return np.ones(channels), bias
    gain = 1 / np.sqrt(_array(norm.running_var) + norm.eps)
    if norm.affine:
        gain = gain * _array(norm.weight)
    bias = (bias - _array(norm.running_mean)) * gain
    return gain, bias + _array(norm.bias) if norm.affine else bias


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().numpy().astype(np.float64)


def _tuple(value: Any, extents: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * extents


def _around(inner: Pairs, outer: Pairs) -> Pairs:
    """Return both paddings of a convolution as one."""
    if not outer:
        return inner
    return tuple((a + c, b + d) for (a, b), (c, d) in zip(inner, outer, strict=True))


def _padding(layer: nn.Conv1d | nn.Conv2d) -> Pairs:
    if not isinstance(layer.padding, str):
        return pairs(layer.padding)
    if layer.padding == "valid":
        return pairs([0] * len(layer.kernel_size))
    totals = [
        d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    ]  # 'same': torch puts the odd one at the end
    return tuple((total // 2, total - total // 2) for total in totals)
