"""Bits per layer: the knapsack is exact, and what it finds can be trained with."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fedq
from fedq import config
from fedq.allocate import allocate
from fedq.cli import main
from fedq.errors import ConfigError
from fedq.quantization.allocation import Layers, best, evolve, front
from fedq.quantization.fake import WeightQuantizer
from fedq.simulation import run_experiment

WIDTHS = (2, 4, 8)
TABLES = st.lists(st.tuples(*(st.integers(0, 30) for _ in WIDTHS)), min_size=1, max_size=4).flatmap(
    lambda costs: st.tuples(
        st.just(costs),
        st.lists(
            st.tuples(*(st.integers(0, 30) for _ in WIDTHS)),
            min_size=len(costs),
            max_size=len(costs),
        ),
    )
)


@given(TABLES, st.integers(0, 130))
def test_the_front_holds_the_best_of_every_budget(
    tables: tuple[list[tuple[int, ...]], list[tuple[int, ...]]], budget: int
) -> None:
    costs, losses = ([dict(zip(WIDTHS, row, strict=True)) for row in of] for of in tables)
    every = [
        (sum(c[w] for c, w in zip(costs, bits, strict=True)),
         sum(x[w] for x, w in zip(losses, bits, strict=True)))
        for bits in itertools.product(WIDTHS, repeat=len(costs))
    ]  # fmt: skip
    within = [loss for cost, loss in every if cost <= budget]
    points = front(costs, losses)
    if within:
        found = best(points, budget)
        assert found.loss == min(within)
        assert found.cost == sum(c[w] for c, w in zip(costs, found.bits, strict=True)) <= budget
    else:
        with pytest.raises(ConfigError, match=f"the cheapest costs {min(every)[0]}"):
            best(points, budget)
    assert [p.cost for p in points] == sorted({p.cost for p in points})
    assert [p.loss for p in points] == sorted({p.loss for p in points}, reverse=True)


def test_a_search_finds_what_the_knapsack_knows_and_repeats_itself() -> None:
    costs = [{2: 2.0, 4: 4.0, 8: 8.0}] * 3
    losses = [{2: 5.0, 4: 1.0, 8: 0.0}, {2: 0.5, 4: 0.1, 8: 0.0}, {2: 9.0, 4: 3.0, 8: 0.0}]
    asked = []

    def loss(bits: tuple[int, ...]) -> float:
        asked.append(bits)
        return sum(of[width] for of, width in zip(losses, bits, strict=True))

    tried = evolve(costs, loss, 14.0, trials=120, seed=1)
    assert len(asked) == len(set(asked)) == len(tried) <= 27
    assert max(p.cost for p in tried) <= 14
    found = min(tried, key=lambda p: p.loss)
    assert found == best(front(costs, losses), 14.0)
    assert tried == evolve(costs, loss, 14.0, trials=120, seed=1)
    with pytest.raises(ConfigError, match="the cheapest costs 6"):
        evolve(costs, loss, 5.0, trials=9, seed=1)


@pytest.mark.parametrize("kind", ["size", "energy", "latency"])
def test_a_search_is_the_reference_under_every_budget(run: Path, kind: str) -> None:
    found = allocate(run, bits=3.5, cost=kind, search=12)
    assert found.searched is not None
    assert max(p.cost for p in (found.chosen, found.knapsack, found.searched)) <= found.budget
    assert (
        min(found.joint.values())
        == found.joint["search" if found.chosen == found.searched else "knapsack"]
    )
    assert {"knapsack", "search"} <= {point["kind"] for point in found.measured}
    assert found == allocate(run, bits=3.5, cost=kind, search=12)


def test_layers_are_quantized_one_at_a_time() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    layers, x = Layers.of(network), torch.randn(5, 4)
    assert layers.names == ("0", "2")
    assert layers.sizes == [32, 24]
    scheme = fedq.build("weight_quantizer", "linear")
    assert torch.equal(layers.network(x), network(x))
    layers.quantize({"2": 2}, scheme)
    quantizers = [m for m in layers.network.modules() if isinstance(m, WeightQuantizer)]
    assert [m.bits for m in quantizers if m.enabled] == [2]
    assert not torch.equal(layers.network(x), network(x))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("allocate") / "run"
    small = ("data=digits", "model=mlp", "model.hidden=[16,16]", "clients=2", "partition=iid")
    more = ("rounds=3", "baseline=false", "engine.workers=1", "clients_per_round=1.0")
    run_experiment(config.load([*small, *more]), path)
    return path


def test_a_run_gets_an_allocation_that_can_be_trained_with(run: Path, tmp_path: Path) -> None:
    found = allocate(run, bits=4.0)
    assert found.layers == ("fc1", "fc2", "fc3")
    assert found.chosen.cost <= found.budget == 4 * sum(found.weights) / 8
    assert found == allocate(run, bits=4.0)
    uniform = next(p for p in found.measured if p["bits"] == (4, 4, 4))
    assert found.chosen.loss <= uniform["loss"]
    bits = json.loads(found.to_json())["chosen"]["bits"]
    options = [f"quantization.layer_bits={bits}", "quantization.weights.range=mse"]
    built = config.load(["quantization=qat", "quantization.weights=linear", *options])
    assert built.quantization.layer_bits == found.chosen.bits


def test_costs_of_ones_own(run: Path, tmp_path: Path) -> None:
    table = {name: {str(w): 10.0 * w for w in (2, 3, 4, 5, 6, 8)} for name in ("fc1", "fc2", "fc3")}
    path = tmp_path / "joules.json"
    path.write_text(json.dumps(table))
    found = allocate(run, costs=path, budget=120.0)
    assert found.unit == "joules"
    assert sum(found.chosen.bits) <= 12
    with pytest.raises(ConfigError, match="--budget"):
        allocate(run, costs=path)
    with pytest.raises(ConfigError, match="the cheapest costs 60"):
        allocate(run, costs=path, budget=50.0)
    path.write_text(json.dumps({"fc1": table["fc1"]}))
    with pytest.raises(ConfigError, match="'fc2'"):
        allocate(run, costs=path, budget=120.0)


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        allocate(tmp_path)


def test_the_command_writes_a_picture_and_says_what_to_train_with(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["allocate", str(run), "--bits", "4", "--weights", "linear range=absmax"]) == 0
    printed = capsys.readouterr().out
    assert (run / "allocation.png").stat().st_size > 1000
    saved = json.loads((run / "allocation.json").read_text())
    assert f"fedq simulate {saved['override']}" in printed
    overrides = shlex.split(saved["override"])
    assert list(config.load(overrides).quantization.layer_bits) == saved["chosen"]["bits"]
    assert main(["allocate", str(run), "--bits", "0.5"]) == 2
    assert "the cheapest costs" in capsys.readouterr().err
