"""Which weights and channels of a network can be pruned, and how channels are cut out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedq.errors import ConfigError
from fedq.pruning.base import Group, Structure
from fedq.quantization.fake import FakeQuantizer
from fedq.quantization.placement import PreparedModel, _kind, _module, _trace

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
#: What maps zero to zero, channel by channel.
_CHANNELWISE = {
    *("ReLU", "ReLU6", "Hardtanh", "relu", "relu6", "hardtanh", "Identity", "Tanh", "tanh"),
    *("Dropout", "Dropout1d", "Dropout2d", "dropout", "ZeroPad1d", "ZeroPad2d"),
    *("MaxPool1d", "MaxPool2d", "max_pool1d", "max_pool2d", "AvgPool1d", "AvgPool2d"),
    *("avg_pool1d", "avg_pool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d"),
    *("Flatten", "flatten"),
}


def structure(network: nn.Module) -> Structure:
    """Return what may be pruned of a network, float or prepared by a quantization.

    Channels are followed from the layer that computes them to the layers that consume them; they
    count if nothing in between mixes them or makes something of zero, and no sum, concatenation or
    output takes them on. A network that ``torch.fx`` cannot trace has nothing to prune.

    Example:
      >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
      >>> structure(network).groups
      (Group(layer='0', tensors=('0.weight', '0.bias'), consumers=(('3.weight', 4),)),)
    """
    if isinstance(network, PreparedModel):
        graph = network.graph
    else:
        try:
            graph = _trace(network)
        except ConfigError:
            return Structure()
    calls = [n for n in graph.nodes if isinstance(_module(network, n), _LAYERS)]
    names = [str(node.target) for node in calls]
    weights = tuple(
        f"{name}.weight" for name in names[1:-1] if not _depthwise(network.get_submodule(name))
    )
    groups = []
    for node, name in zip(calls, names, strict=True):
        if names.count(name) == 1 and getattr(network.get_submodule(name), "groups", 1) == 1:
            try:
                tensors, consumers = zip(*_followed(network, node), strict=True)
            except _MixedError:
                continue
            groups.append(
                Group(name, *(tuple(filter(None, part)) for part in (tensors, consumers)))
            )
    return Structure(tuple(dict.fromkeys(weights)), tuple(groups))


class _MixedError(Exception):
    """Channels go where they cannot be followed."""


def _depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1


def _followed(
    network: nn.Module, node: fx.Node
) -> Iterator[tuple[str | None, tuple[str, int] | None]]:
    """Yield the tensors and the consumers of the channels that a layer computes."""
    channels = len(network.get_submodule(str(node.target)).weight)  # type: ignore[arg-type]
    for name in _own(network, node):
        yield name, None
    left = list(node.users)
    if not left:
        raise _MixedError
    while left:
        user = left.pop()
        module: Any = _module(network, user)
        if isinstance(module, _LAYERS):
            if not _depthwise(module):
                yield None, (f"{user.target}.weight", module.weight.shape[1] // channels)
                continue
            if module.groups != channels or len(module.weight) != channels:
                raise _MixedError
        if isinstance(module, (*_LAYERS, *_NORMS)):
            for name in _own(network, user):
                yield name, None
        elif not isinstance(module, FakeQuantizer) and _kind(network, user) not in _CHANNELWISE:
            raise _MixedError
        if user.op == "output" or not user.users:
            raise _MixedError
        left += user.users


def _own(network: nn.Module, node: fx.Node) -> list[str]:
    """Return weight and bias of a module, by their names in the network."""
    module: Any = _module(network, node)
    return [f"{node.target}.{n}" for n in ("weight", "bias") if getattr(module, n) is not None]


def empty_channels(network: nn.Module) -> dict[str, Tensor]:
    """Return which channels of each group have something in them, by layer, where some have not."""
    tensors = dict(network.named_parameters())
    found = {}
    for group in structure(network).groups:
        parts = [
            tensors[name].detach().flatten(1)
            if tensors[name].dim() > 1
            else tensors[name].detach()[:, None]
            for name in group.tensors
        ]
        stays = torch.cat(parts, 1).ne(0).any(1)
        if not stays.all():
            found[group.layer] = stays
    return found


def without_empty_channels(network: nn.Module) -> dict[str, int]:
    """Cut out of a network, in place, the channels that are zero whatever the input.

    A layer keeps at least one. What the network computes stays, up to the order of float sums.

    Returns:
      By layer, how many channels were cut.

    Example:
      >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
      >>> with torch.no_grad():
      ...     _ = network[0].weight[1:].zero_(), network[0].bias[1:].zero_()
      >>> without_empty_channels(network), network[3].weight.shape
      ({'0': 3}, torch.Size([2, 4]))
    """
    empty = empty_channels(network)
    cut = {}
    for group in structure(network).groups:
        stays = empty.get(group.layer)
        if stays is None:
            continue
        if not stays.any():
            stays[0] = True
        for name in dict.fromkeys(name.rpartition(".")[0] for name in group.tensors):
            _cut(network.get_submodule(name), stays, 0)
        for name, block in group.consumers:
            _cut(network.get_submodule(name.rpartition(".")[0]), stays.repeat_interleave(block), 1)
        cut[group.layer] = int((~stays).sum())
    return cut


def _cut(layer: Any, stays: Tensor, axis: int) -> None:
    """Keep some rows (axis 0) or columns (axis 1) of a layer, and what it says of its own shape."""
    count, index = int(stays.sum()), stays.nonzero().flatten()
    for module in (layer, getattr(layer, "weight_quantizer", None)):
        for name, tensor in (
            () if module is None else [*module._parameters.items(), *module._buffers.items()]
        ):
            size = tensor is not None and tensor.dim() > axis and tensor.shape[axis]
            if size != len(stays) or (axis == 1 and name != "weight"):
                continue
            part = tensor.detach().index_select(axis, index).clone()
            if isinstance(tensor, nn.Parameter):
                part = nn.Parameter(part, requires_grad=tensor.requires_grad)
            setattr(module, name, part)
    if isinstance(layer, _NORMS):
        layer.num_features = count
    elif isinstance(layer, nn.Linear):
        setattr(layer, ("out_features", "in_features")[axis], count)
    else:
        setattr(layer, ("out_channels", "in_channels")[axis], count)
        if axis == 0 and layer.groups > 1:
            layer.groups = layer.in_channels = count
