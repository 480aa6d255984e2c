"""Bits per layer under a budget: measured sensitivity and an exact knapsack.

After HAWQ-V2 (Dong et al. 2020, NeurIPS) and ZeroQ (Cai et al. 2020, CVPR), which choose along the
Pareto front of a sum of per-layer sensitivities; here a sensitivity is the loss that quantizing one
layer alone adds, so no Hessian is needed and any scheme can be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from fedq.errors import ConfigError, unknown
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


#: Picojoules: an 8-bit product per bit of the weight, a 32-bit sum, a bit read from 8 kB of SRAM
#: (Horowitz 2014, ISSCC, figure 1.1.9: 0.2 pJ, 0.1 pJ, and 10 pJ per 64 bits at 45 nm).
_PRODUCT_PJ, _SUM_PJ, _READ_PJ = 0.2 / 8, 0.1, 10 / 64
#: More than any loss: what is beyond the budget is worse than all that is within.
_BEYOND = 1e9
#: What a budget may be of, and its unit.
UNITS = {"size": "bytes", "energy": "nJ per inference", "latency": "bit-serial cycles"}


def cost(kind: str, weights: int, macs: int, bits: float) -> float:
    """Return what a layer costs at a width; all kinds are linear in it.

    ``size``: bytes of packed weights. ``energy``: nanojoules of an inference by the energies of
    single operations, with 8-bit activations. ``latency``: cycles of one bit-serial unit, a
    weight's bit each (Judd et al. 2016, MICRO, "Stripes"). Kernels for int8 take the same time at
    all widths; who has measured a device brings a table of its own.

    >>> cost("size", 100, 1000, 4), cost("latency", 100, 1000, 4), cost("energy", 100, 1000, 4)
    (50.0, 4000.0, 0.2625)
    """
    if kind == "size":
        return weights * bits / 8
    if kind == "latency":
        return float(macs * bits)
    if kind == "energy":
        return (macs * (_SUM_PJ + _PRODUCT_PJ * bits) + weights * bits * _READ_PJ) / 1000
    raise unknown("cost", kind, UNITS)


def evolve(
    costs: Table,
    loss: Callable[[tuple[int, ...]], float],
    budget: float,
    *,
    trials: int,
    seed: int,
) -> list[Point]:
    """Search widths by an evolutionary algorithm, with the loss of all layers together.

    NSGA-II (Deb et al. 2002, IEEE Trans. Evol. Comput. 6) over a width per layer; allocations
    beyond the budget lose against all within, by how far they are beyond. It assumes nothing of
    how layers' losses add up, and evaluates the network in each trial: the reference of
    :func:`front`.

    Args:
      costs: Of each layer, by width.
      loss: Of an allocation.
      budget: In units of cost.
      trials: Allocations that are drawn; those within the budget are evaluated, none twice.
      seed: Of the search.

    Returns:
      What was evaluated, in order.

    Raises:
      ConfigError: If Optuna is missing, there are no trials, or no allocation is within the budget.
    """
    if find_spec("optuna") is None:
        raise ConfigError("a search needs Optuna: pip install -e '.[study]'")
    if trials < 1:
        raise ConfigError(f"a search needs at least 1 trial, not {trials}")
    best(front(costs, costs), budget)  # refuses a budget that is too small
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried: dict[tuple[int, ...], Point] = {}

    def objective(trial: optuna.Trial) -> float:
        bits = tuple(
            int(trial.suggest_categorical(f"layer{i}", sorted(of))) for i, of in enumerate(costs)
        )
        total = float(sum(of[width] for of, width in zip(costs, bits, strict=True)))
        if total > budget:
            return _BEYOND * total / budget
        if bits not in tried:
            tried[bits] = Point(bits, total, loss(bits))
        return tried[bits].loss

    sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=min(20, trials))
    study = optuna.create_study(sampler=sampler)
    cheapest = tuple(min(of, key=of.__getitem__) for of in costs)  # so that one is within
    study.enqueue_trial({f"layer{i}": width for i, width in enumerate(cheapest)})
    study.optimize(objective, n_trials=trials)
    return list(tried.values())


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
