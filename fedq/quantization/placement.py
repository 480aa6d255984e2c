"""Where quantizers go: weights of dense and convolutional layers, outputs of what computes.

An activation quantizer sits on a producer (one per value, however many consumers): on the input,
and at the end of each chain ``layer [- batch norm] [- ReLU] [- max pool]`` that an integer kernel
computes in one go, on sums, products, concatenations, averages and other activations. What only
moves values (flatten, dropout, max pooling, ...) keeps its input's grid. As the maximum commutes
with rounding and clipping, a quantizer after a max pooling equals one before it, at a quarter of
the work. A ReLU is left to the quantizer behind it, which clamps anyway.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, fx, nn

from fedq.errors import ConfigError
from fedq.quantization.fake import ActivationQuantizer, WeightQuantizer

#: The submodule of a prepared network that holds the activation quantizers.
ACTIVATIONS = "activation_quantizers"

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_RELUS = {"ReLU", "ReLU6", "Hardtanh", "relu", "relu6", "hardtanh"}
_MAX_POOLS = {"MaxPool1d", "MaxPool2d", "max_pool1d", "max_pool2d"}
_MOVES = {
    *("AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AlphaDropout", "ChannelShuffle", "Dropout"),
    *("Dropout1d", "Dropout2d", "Flatten", "Identity", "LogSoftmax", "PixelShuffle"),
    *("PixelUnshuffle", "Softmax", "Unflatten", "ZeroPad1d", "ZeroPad2d", *_MAX_POOLS),
}
_COMPUTES = {
    *("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "div", "neg", "abs"),
    *("cat", "concat", "stack", "sum", "mean", "matmul", "bmm", "exp", "sqrt", "pow"),
    *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "interpolate"),
    *("gelu", "silu", "elu", "leaky_relu", "prelu", "sigmoid", "tanh", "hardswish", "mish"),
    *("hardsigmoid", "softplus", "layer_norm", "group_norm", "batch_norm", "clamp"),
    *("maximum", "minimum", *(_RELUS - {"ReLU", "ReLU6", "Hardtanh"})),
}
_WEIGHTED_FUNCTIONS = {
    *("linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_MOVE_FUNCTIONS = {
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"),
    *("getitem", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "expand", "clone"),
    *(
        "repeat",
        "detach",
        "to",
        "float",
        "dropout",
        "pad",
        "softmax",
        "log_softmax",
        "roll",
        "flip",
    ),
    *("movedim", "swapaxes", "swapdims", "t", "unflatten", "channel_shuffle", "pixel_shuffle"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "amax", "amin", "expand_as", "view_as"),
    *("feature_dropout", "alpha_dropout", "tile", "repeat_interleave", "broadcast_to", *_MAX_POOLS),
}
_SHAPE_QUERIES = {"size", "dim", "numel", "ndimension", "getattr", "len"}


class QuantizedConv1d(nn.Conv1d):
    """A 1-D convolution with a fake-quantized weight."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        out: Tensor = self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)
        return out


class QuantizedConv2d(nn.Conv2d):
    """A 2-D convolution with a fake-quantized weight."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        out: Tensor = self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)
        return out


class QuantizedLinear(nn.Linear):
    """A dense layer with a fake-quantized weight."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Multiply."""
        weight: Tensor = self.weight_quantizer(self.weight)
        return nn.functional.linear(input, weight, self.bias)


_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
}


class PreparedModel(nn.Module):
    """A network with quantizers: the float network's modules, run by a graph that knows them.

    Attributes:
      graph: The ``torch.fx`` graph, for exporters: ``fx.GraphModule(prepared, prepared.graph)``.
      distillation: Share of the loss that the float twin teaches.
    """

    graph: fx.Graph
    distillation: float = 0.0

    def __init__(self, tree: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self._parameters.update(tree._parameters)
        self._buffers.update(tree._buffers)
        self._non_persistent_buffers_set.update(tree._non_persistent_buffers_set)
        self._modules.update(tree._modules)
        self.training = tree.training
        for node in graph.find_nodes(op="get_attr"):
            value = vars(tree).get(node.target)
            if isinstance(value, Tensor):  # a constant that tracing met
                self.register_buffer(node.target, value, persistent=False)
        self.graph = graph
        fused = _leave_relus_to_quantizers(self, graph)
        self._run: Callable[..., Any] = type(fx.GraphModule(self, fused)).forward

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph."""
        return self._run(self, *inputs)


#: Of a layer: the first or the last (``edge``), one filter per channel, or any other.
Role = Literal["edge", "depthwise", "inner"]


def place(
    model: nn.Module,
    weight_quantizer: Callable[[Tensor, int, Role], WeightQuantizer],
    activation_quantizer: Callable[[bool, bool], ActivationQuantizer] | None,
) -> PreparedModel:
    """Return a copy of a network, sharing its parameters, with quantizers in place.

    Args:
      model: A float network.
      weight_quantizer: Makes the quantizer of a layer, of its weight, its number in the order of
        the graph and its role there.
      activation_quantizer: Makes the quantizer of an activation; the flags tell the input and the
        last layer's output, and what comes out of a ReLU. None leaves activations in float.

    Raises:
      ConfigError: If the network cannot be traced, calls an operator that is not known here, has a
        weighted layer that is not ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Linear``, or none of these.
    """
    if any(isinstance(module, PreparedModel) for module in model.modules()):
        raise ConfigError("the model is already prepared for quantization")
    if type(model) in _QUANTIZED:
        raise ConfigError("the model is a single layer; put it into an nn.Sequential")
    tree = _shallow_copy(model)
    graph = _trace(tree)
    if str(graph) != str(_trace(_shallow_copy(model).train(not model.training))):
        raise ConfigError(
            f"cannot quantize {type(model).__name__}: its forward depends on self.training, which"
            " torch.fx would freeze; use modules such as nn.Dropout, or quantization=none"
        )
    layers = _weighted_layers(tree, graph)
    edges = {layers[0], layers[-1]}
    if activation_quantizer is not None:
        _place_activations(tree, graph, layers, activation_quantizer)
    first_or_last = {str(node.target) for node in edges}
    for index, name in enumerate(dict.fromkeys(str(node.target) for node in layers)):
        layer: Any = tree.get_submodule(name)
        quantized = _shallow_copy(layer, _QUANTIZED[type(layer)])
        role = _role(layer, name in first_or_last)
        quantized.weight_quantizer = weight_quantizer(layer.weight, index, role)
        tree.set_submodule(name, quantized)
    return PreparedModel(tree, graph)


class _Tracer(fx.Tracer):
    """A tracer that leaves batch normalisations of other kinds whole, too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BATCH_NORMS) or super().is_leaf_module(m, module_qualified_name)


def _trace(tree: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(tree)
    except Exception as error:  # the network's own code runs on proxies: anything may happen
        raise ConfigError(
            f"cannot quantize {type(tree).__name__}: torch.fx cannot trace it ({error}); remove"
            " control flow that depends on values, or use quantization=none"
        ) from error


def _weighted_layers(tree: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """Return the calls of layers whose weights are quantized, in order; refuse others."""
    layers = []
    for node in graph.nodes:
        module = _module(tree, node)
        if type(module) in _QUANTIZED:
            layers.append(node)
        elif module is not None and any(p.dim() > 1 for p in module.parameters()):
            raise ConfigError(
                f"cannot quantize layer {node.target} ({type(module).__name__}); use Conv1d,"
                " Conv2d and Linear, or quantization=none"
            )
        elif node.op == "call_function" and _kind(tree, node) in _WEIGHTED_FUNCTIONS:
            raise ConfigError(
                f"cannot quantize a call of torch's {_kind(tree, node)}; use the layer from"
                " torch.nn as it is, or quantization=none"
            )
    if not layers:
        raise ConfigError("the model has no Conv1d, Conv2d or Linear layer to quantize")
    return layers


def _role(layer: nn.Module, edge: bool) -> Role:
    if edge:
        return "edge"
    groups = getattr(layer, "groups", 1)
    return "depthwise" if groups > 1 and groups == layer.in_channels else "inner"


def _place_activations(
    tree: nn.Module,
    graph: fx.Graph,
    layers: list[fx.Node],
    make: Callable[[bool, bool], ActivationQuantizer],
) -> None:
    quantizers = nn.ModuleDict()
    inputs = [node for node in graph.find_nodes(op="placeholder") if node.users]
    done: set[fx.Node] = set()
    shapes: set[fx.Node] = set()  # sizes and such: not tensors
    for node in list(graph.nodes):
        kind = _kind(tree, node)
        if kind in _SHAPE_QUERIES or (
            node.op == "call_function"
            and node.all_input_nodes
            and shapes.issuperset(node.all_input_nodes)
        ):
            shapes.add(node)
            continue
        module = _module(tree, node)
        computes = kind not in _MOVES if module is not None else kind in _COMPUTES
        if not computes and node.op in ("call_function", "call_method"):
            _check_known(tree, node, kind)
        if node in done or not (computes or node in inputs):
            continue
        chain = [node] if node in inputs else _chain(tree, node)
        done.update(chain)
        key = "input" if inputs == [node] else chain[-1].name
        if hasattr(quantizers, key):
            key += "_quantizer"
        rectified = not {"ReLU", "ReLU6", "relu", "relu6"}.isdisjoint(
            _kind(tree, part) for part in chain
        )
        quantizers[key] = make(node in inputs or node is layers[-1], rectified)
        with graph.inserting_after(chain[-1]):
            quantized = graph.call_module(f"{ACTIVATIONS}.{key}", (chain[-1],))
        chain[-1].replace_all_uses_with(quantized)
        quantized.args = (chain[-1],)  # that call replaced this use too
    tree.add_module(ACTIVATIONS, quantizers)


def _check_known(tree: nn.Module, node: fx.Node, kind: str) -> None:
    """Refuse an operator of which nothing is known: its output might need a grid of its own."""
    if kind not in _MOVE_FUNCTIONS:
        path = list(node.meta.get("nn_module_stack", {}))[-1:] or [""]
        where = f"in module '{path[0]}'" if path[0] else "in the model's own forward"
        raise ConfigError(
            f"cannot quantize {type(tree).__name__}: operator '{kind}' {where} is not supported;"
            " use a module of torch.nn in its place, or quantization=none"
        )


def _leave_relus_to_quantizers(model: nn.Module, graph: fx.Graph) -> fx.Graph:
    """Return the graph without the ReLUs that are followed by a quantizer, which rectifies.

    Max pooling in between commutes with both.
    """
    fused = copy.deepcopy(graph)
    for node in list(fused.nodes):
        quantizer = _module(model, node)
        if not (isinstance(quantizer, ActivationQuantizer) and quantizer.rectified):
            continue
        source = node.args[0]
        while isinstance(source, fx.Node) and _kind(model, source) in _MAX_POOLS and source.args:
            source = source.args[0]
        if (
            isinstance(source, fx.Node)
            and _kind(model, source) in ("ReLU", "relu")
            and len(source.users) == 1
            and isinstance(source.args[0] if source.args else None, fx.Node)
        ):
            source.replace_all_uses_with(source.args[0])  # type: ignore[arg-type]
            fused.erase_node(source)
            quantizer.rectifies = True
    return fused


def _chain(tree: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Return the calls that an integer kernel computes in one go with ``node``, itself first."""
    chain = [node]
    while len(users := list(chain[-1].users)) == 1:
        user = users[0]
        after_layer = len(chain) == 1 and type(_module(tree, node)) in _QUANTIZED
        kind = _kind(tree, user)
        if not (
            (after_layer and isinstance(_module(tree, user), _BATCH_NORMS))
            or kind in _RELUS
            or kind in _MAX_POOLS
        ):
            break
        chain.append(user)
    return chain


def _module(tree: nn.Module, node: fx.Node) -> nn.Module | None:
    return tree.get_submodule(str(node.target)) if node.op == "call_module" else None


def _kind(tree: nn.Module, node: fx.Node) -> str:
    """Return the name of a module's class, a function or a method, without in-place marks."""
    module = _module(tree, node)
    if module is not None:
        return type(module).__name__
    if node.op in ("call_function", "call_method"):
        return str(getattr(node.target, "__name__", node.target)).strip("_")
    return ""


def _shallow_copy(module: nn.Module, cls: type[nn.Module] | None = None) -> Any:
    """Return a module with its own tree of submodules and the same parameters and buffers."""
    cls = cls or type(module)
    twin = cls.__new__(cls)
    twin.__dict__.update(
        {k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(module).items()}
    )
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _shallow_copy(child)
    return twin
