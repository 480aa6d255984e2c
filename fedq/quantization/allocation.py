"""Bits per layer under a budget: measured sensitivity and an exact knapsack.

After HAWQ-V2 (Dong et al. 2020, NeurIPS) and ZeroQ (Cai et al. 2020, CVPR), which choose along the
Pareto front of a sum of per-layer sensitivities; here a sensitivity is the loss that quantizing one
layer alone adds, so no Hessian is needed and any scheme can be asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedq.errors import ConfigError
from fedq.quantization.fake import WeightQuantizer
from fedq.quantization.qat import Qat
from fedq.quantization.weights.base import WeightScheme

#: Per layer: by width, what it costs (bytes, joules, seconds) or the loss that it adds.
Table = Sequence[Mapping[int, float]]


@dataclass(frozen=True)
class Point:
    """One allocation on the Pareto front.

    Attributes:
      bits: Per layer, in the order of the graph.
      cost: Sum of the layers' costs.
      loss: Sum of the layers' added losses.
    """

    bits: tuple[int, ...]
    cost: float
    loss: float


def front(costs: Table, losses: Table) -> list[Point]:
    """Return all Pareto-optimal allocations by rising cost: the exact multiple-choice knapsack.

    Layer by layer every partial allocation is extended by every width, and those that another one
    beats in both sums are dropped; none of them can be part of a better whole. The last point
    within a budget is the best one for it.

    Args:
      costs: Of each layer, by width.
      losses: Of each layer, by the same widths.

    Raises:
      ConfigError: If the tables name no layer, or different widths.

    Example:
      >>> costs = [{8: 80, 4: 40}, {8: 8, 4: 4}]
      >>> losses = [{8: 0.0, 4: 0.1}, {8: 0.0, 4: 0.5}]
      >>> [(p.bits, p.cost) for p in front(costs, losses)]
      [((4, 4), 44), ((4, 8), 48), ((8, 8), 88)]
    """
    if not costs or [set(c) for c in costs] != [set(x) for x in losses] or not all(costs):
        raise ConfigError("costs and losses must name the same widths for each of some layers")
    points = [Point((), 0, 0.0)]
    for cost, loss in zip(costs, losses, strict=True):
        extended = [
            Point((*point.bits, width), point.cost + cost[width], point.loss + loss[width])
            for point in points
            for width in cost
        ]
        points = []
        for point in sorted(extended, key=lambda p: (p.cost, p.loss)):
            if not points or point.loss < points[-1].loss:
                points.append(point)
    return points


def best(points: Sequence[Point], budget: float) -> Point:
    """Return the point of least loss within a budget.

    Raises:
      ConfigError: If none is; the least cost is named.
    """
    within = [point for point in points if point.cost <= budget]
    if not within:
        raise ConfigError(
            f"no allocation costs {budget:,.0f} or less; the cheapest costs {points[0].cost:,.0f}"
        )
    return within[-1]


@dataclass(frozen=True)
class Layers:
    """A network whose layers' weights can be quantized one at a time; activations are float.

    Attributes:
      network: Float until told otherwise; shares its parameters with the one it was made of.
      names: Of the layers, in the order of the graph.
    """

    network: nn.Module
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """Return the layers of a float network."""
        network = Qat(activations=None).prepare(model)
        names = [
            name.removesuffix(".weight_quantizer")
            for name, module in network.named_modules()
            if isinstance(module, WeightQuantizer)
        ]
        layers = cls(network, tuple(names))
        layers.quantize({}, Qat().weights)
        return layers

    @property
    def sizes(self) -> list[int]:
        """Weights per layer."""
        return [self.network.get_parameter(f"{name}.weight").numel() for name in self.names]

    def quantize(self, bits: Mapping[str, int], scheme: WeightScheme) -> None:
        """Quantize the named layers to their widths, and leave the others in float."""
        for name in self.names:
            layer = self.network.get_submodule(name)
            weight = self.network.get_parameter(f"{name}.weight")
            width = bits.get(name)
            with torch.no_grad():
                quantizer = (scheme if width is None else scheme.at(width)).quantizer(weight)
            quantizer.enabled = width is not None
            layer.weight_quantizer = quantizer.train(self.network.training)
