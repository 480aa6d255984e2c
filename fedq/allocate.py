"""Bits per layer for a finished run: ``fedq allocate RUN``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedq import registry
from fedq.config import load_plugins
from fedq.data.base import load
from fedq.errors import ConfigError
from fedq.models.base import create
from fedq.models.cost import layer_macs
from fedq.quantization.allocation import UNITS, Layers, Point, Table, best, evolve, front
from fedq.quantization.allocation import cost as modelled
from fedq.quantization.weights.base import WeightScheme
from fedq.random import derive, generator
from fedq.results import read_config, read_model
from fedq.training import Trainer

MOST_EXAMPLES = 1000
#: Points of the front that are measured.
MEASURED = 8


@dataclass(frozen=True)
class Allocation:
    """What was found for a run.

    Attributes:
      layers: Names, in the order of the graph.
      weights: Per layer.
      scheme: Of the weights.
      unit: Of costs.
      losses: Per layer, the loss that each width adds alone.
      chosen: The best within the budget: of the knapsack, or of a search if that found less loss.
      knapsack: Of the knapsack.
      searched: Of the search, None without one; its loss is that of all layers together.
      joint: The loss that all layers together add, by whose choice it is.
      budget: In units of cost.
      measured: Points of the front, and uniform widths, with the task's metric on the test set of
        weights at these widths and activations in float.
    """

    layers: tuple[str, ...]
    weights: tuple[int, ...]
    scheme: dict[str, Any]
    unit: str
    losses: list[dict[int, float]]
    chosen: Point
    knapsack: Point
    searched: Point | None
    joint: dict[str, float]
    budget: float
    measured: list[dict[str, Any]]

    @property
    def override(self) -> str:
        """What to give to ``fedq simulate``."""
        bits = ",".join(map(str, self.chosen.bits))
        weights = " ".join(
            f"quantization.weights{'' if key == 'name' else '.' + key}={str(value).lower()}"
            for key, value in self.scheme.items()
            if key in ("name", "range")
        )
        return f"quantization=qat {weights} 'quantization.layer_bits=[{bits}]'"

    def to_json(self) -> str:
        """Return all of it."""
        return json.dumps(dataclasses.asdict(self) | {"override": self.override}, indent=1)


def allocate(
    run: Path,
    *,
    bits: float = 4.0,
    scheme: WeightScheme | None = None,
    widths: Sequence[int] = (2, 3, 4, 5, 6, 8),
    cost: str = "size",
    costs: Path | None = None,
    budget: float | None = None,
    search: int = 0,
    seed: int = 0,
) -> Allocation:
    """Find the widths of least added loss within a budget.

    Losses are those of up to 1,000 training examples, drawn by ``seed``.

    Args:
      run: A finished run's directory.
      bits: The budget as what this width costs if all layers have it, unless ``budget`` is given.
      scheme: Of the weights; ``linear`` with the clip of least square error by default.
      widths: That a layer may have, as far as the scheme knows them.
      cost: What the budget is of: ``size``, ``energy`` or ``latency``; see
        :func:`fedq.quantization.allocation.cost`.
      costs: A JSON file in its place: per layer of the network by name, an object of costs by
        width, such as joules or milliseconds measured on a device.
      budget: In units of costs.
      search: Trials of an evolutionary search beside the knapsack; 0 is none.
      seed: Of the examples and of the search.

    Raises:
      ConfigError: If the run is not finished, its model has no layers that can be quantized, or the
        budget is too small.
    """
    if scheme is None:
        scheme = registry.build("weight_quantizer", "linear", range="mse")
    settings = read_config(run)
    load_plugins(settings.get("plugins", ()))
    tensors, _ = read_model(run)
    dataset = load(registry.from_config("data", settings["data"]))
    model = registry.from_config("model", settings["model"])
    layers = Layers.of(create(model, dataset.input_shape, dataset.outputs))
    trainer = Trainer(layers.network, registry.from_config("task", dataset.task))
    fresh = trainer.state_layout.unflatten(trainer.state())
    state = {name: tensors.get(name, value) for name, value in fresh.items()}
    try:
        weights = trainer.layout.flatten({name: tensors[name] for name in trainer.layout.names})
    except KeyError as error:
        raise ConfigError(f"{run} holds no tensor {error}; its model is another one") from None
    trainer.load(weights, trainer.state_layout.flatten(state))
    sizes = dict(zip(layers.names, layers.sizes, strict=True))
    allowed = [width for width in widths if width in scheme.supported]
    macs = layer_macs(layers.network, dataset.input_shape)
    table, unit = _costs(sizes, macs, allowed, cost, costs)
    rows = generator(derive(seed, "allocate")).permutation(len(dataset.y_train))[:MOST_EXAMPLES]
    x, y = dataset.train_inputs(np.sort(rows)), dataset.y_train[np.sort(rows)]
    layers.quantize({}, scheme)
    plain = trainer.evaluate(x, y).loss
    losses: list[dict[int, float]] = []
    for name in layers.names:
        added = {}
        for width in allowed:
            layers.quantize({name: width}, scheme)
            added[width] = max(trainer.evaluate(x, y).loss - plain, 0.0)
        losses.append(added)
    points = front(table, losses)
    if budget is None:
        if costs is not None:
            raise ConfigError("costs of your own need a --budget in their unit")
        budget = sum(modelled(cost, size, macs[name], bits) for name, size in sizes.items())
    chosen = knapsack = best(points, budget)

    def joint(bits: tuple[int, ...]) -> float:
        layers.quantize(dict(zip(layers.names, bits, strict=True)), scheme)
        return trainer.evaluate(x, y).loss - plain

    found, searched = {"knapsack": joint(knapsack.bits)}, None
    if search:
        tried = evolve(table, joint, budget, trials=search, seed=derive(seed, "search") % 2**32)
        searched = min(tried, key=lambda p: (p.loss, p.cost))
        found["search"] = searched.loss
        if searched.loss < found["knapsack"]:
            chosen = searched
    x, y = dataset.test_inputs(), dataset.y_test
    measured = []
    for kind, point in _shown(points, knapsack, searched, table, losses, allowed):
        layers.quantize(dict(zip(layers.names, point.bits, strict=True)), scheme)
        score = {trainer.task.metric.name: trainer.evaluate(x, y).score}
        measured.append({"kind": kind, **dataclasses.asdict(point), **score})
    return Allocation(
        layers.names,
        tuple(sizes.values()),
        registry.to_config(scheme),
        unit,
        losses,
        chosen,
        knapsack,
        searched,
        found,
        budget,
        measured,
    )


def _costs(
    sizes: Mapping[str, int],
    macs: Mapping[str, int],
    widths: Sequence[int],
    kind: str,
    path: Path | None,
) -> tuple[list[dict[int, float]], str]:
    if path is None:
        rows = [{w: modelled(kind, sizes[n], macs[n], w) for w in widths} for n in sizes]
        return rows, UNITS[kind]
    try:
        given = json.loads(path.read_text())
        table = [{w: float(given[name][str(w)]) for w in widths} for name in sizes]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read the costs in {path}: {error}") from error
    except KeyError as error:
        raise ConfigError(
            f"{path} has no costs of {error}; it needs each of {', '.join(sizes)} at each of"
            f" {', '.join(map(str, widths))} bits"
        ) from None
    return table, path.stem


def _shown(
    points: Sequence[Point],
    knapsack: Point,
    searched: Point | None,
    costs: Table,
    losses: Table,
    widths: Sequence[int],
) -> list[tuple[str, Point]]:
    """Return what was chosen, some of the front, and uniform widths."""
    places = np.unique(np.linspace(0, len(points) - 1, MEASURED).round().astype(int))
    shown = [("knapsack", knapsack)] + [("front", points[i]) for i in places]
    if searched is not None:
        shown.append(("search", searched))
    for width in widths:
        bits = (width,) * len(costs)
        cost, loss = (sum(layer[width] for layer in of) for of in (costs, losses))
        shown.append(("uniform", Point(bits, cost, loss)))
    return shown
