"""Reconstruction: exact where it must be, bounds that hold, and controls that catch broken ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedq
from fedq import Layout
from fedq.errors import ConfigError
from fedq.robustness import _inversion as inversion
from fedq.robustness import reconstruction
from fedq.robustness._cells import Cells, cells
from fedq.robustness._fidelity import decibels, similarity
from fedq.robustness._victims import Knowledge, Target, drawn
from fedq.robustness.base import Work
from fedq.robustness.reconstruction import Reconstruction, closed_form
from fedq.robustness.subject import Subject
from fedq.training import Trainer
from fedq.training_config import TrainingConfig
from tests import leaking

SMALL = Reconstruction(inputs=8, searched=2, iterations=100, restarts=1, crowd=5)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return leaking.subject(tmp_path_factory.mktemp("reconstruction") / "run")


# --- cells -------------------------------------------------------------------------------------

LAYOUT = Layout.of({"w": np.zeros((20, 30)), "b": np.zeros(20)})
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("identity", {}),
    ("sign", {}),
    ("uniform", {"bits": 1}),
    ("uniform", {"bits": 1, "rounding": "stochastic"}),
    ("uniform", {"bits": 1, "rounding": "dithered", "symmetric": False}),
    ("uniform", {"bits": 2, "symmetric": False, "scale": "channel"}),
    ("uniform", {"bits": 4, "rounding": "stochastic"}),
    ("uniform", {"bits": 5, "rounding": "dithered", "scale": "model"}),
    ("uniform", {"bits": 8, "rounding": "dithered", "scale": "bucket", "bucket": 64}),
]


@pytest.mark.parametrize(("name", "options"), EXACT)
@pytest.mark.parametrize("seed", range(3))
def test_the_truth_is_in_its_cell(name: str, options: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=LAYOUT.size) * rng.random(LAYOUT.size) ** 4).astype(np.float32)
    payload = fedq.build("codec", name, **options).encode(x, LAYOUT, seed)
    found = cells(payload, LAYOUT, x)
    assert found.exact
    assert ((found.low <= x) & (x <= found.high)).all()
    turned = found.scaled(-2.0)
    assert ((turned.low <= -2 * x) & (-2 * x <= turned.high)).all()


@pytest.mark.parametrize("name", ["top_k", "drive", "dtcq", "ternary", "qsgd", "bf16"])
def test_estimated_cells_hold_most_of_an_update(name: str) -> None:
    rng = np.random.default_rng(0)
    x, own = rng.normal(size=(2, LAYOUT.size)).astype(np.float32)
    found = cells(fedq.build("codec", name).encode(x, LAYOUT, 1), LAYOUT, own)
    assert not found.exact
    assert ((found.low <= x) & (x <= found.high)).mean() > 0.85


# --- the closed form ---------------------------------------------------------------------------


def dense_update(x: np.ndarray, label: int, steps: int = 1) -> tuple[Target, Any]:
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(x.shape[1], 16), nn.ReLU(), nn.Linear(16, 4)))
    target = Target(trainer, trainer.weights(), trainer.state())
    training = TrainingConfig(local_epochs=steps, learning_rate=0.1)
    return target, target.update(x, np.array([label]), training, 0)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_float_update_of_one_example_is_the_example(seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, 50)).astype(np.float32)
    target, update = dense_update(x, seed % 4, steps)
    known = Knowledge(rng.normal(size=(100, 50)).astype(np.float32) * 2, np.zeros(100, np.int64))
    seen = Cells(update, update, update)
    for name, found in closed_form(target, seen, known).items():
        inside = (x[0] >= known.span[0]) & (x[0] <= known.span[1])
        assert np.abs(found - x[0])[inside].max() < 1e-2, name
    assert target.label(update) == seed % 4


def test_more_units_average_errors_out() -> None:
    """Least squares weighs by a noisy bias; the leading singular vector sees the whole matrix."""
    rng = np.random.default_rng(0)
    x, errors = rng.normal(size=200), rng.normal(size=64)
    weight = np.outer(errors, x) + 0.3 * rng.normal(size=(64, 200))
    bias = errors + 0.3 * rng.normal(size=64)

    def distance(found: np.ndarray) -> float:
        return float(np.square(found - x).mean())

    least, rank = inversion.least_squares(weight, bias), inversion.rank_one(weight, bias)
    assert distance(rank) < 0.7 * distance(least)
    assert not inversion.least_squares(weight, 0 * bias).any()


def test_knowing_the_cells_is_better_than_taking_levels_at_face_value() -> None:
    rng = np.random.default_rng(1)
    known = Knowledge(rng.random((200, 100)).astype(np.float32), np.zeros(200, np.int64))
    gains = []
    for seed in range(6):
        x = (rng.random((1, 100)) ** 3).astype(np.float32)
        target, update = dense_update(x, seed % 4)
        codec = fedq.build("codec", "uniform", bits=3, rounding="dithered", scale="model")
        seen = cells(codec.encode(update, target.layout, seed), target.layout, update)
        found = closed_form(target, seen, known)
        gains.append(decibels(found["cells"], x[0], 1) - decibels(found["least squares"], x[0], 1))
    assert np.mean(gains) > 1


def test_signs_tell_which_inputs_are_positive() -> None:
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=80), 0)
    errors = rng.normal(size=32)
    for zero in (1, -1):
        weight = np.sign(np.outer(errors, x))
        weight[weight == 0] = zero
        found = inversion.from_signs(weight, np.sign(errors), (0.0, 0.7))
        assert np.array_equal(found > 0, x > 0)


def test_neighbouring_units_of_an_imprinted_layer_hold_one_example_each(subject: Subject) -> None:
    target = Target.dense(subject, 64)
    flat = subject.dataset.test_inputs().reshape(-1, 64).astype(np.float64)
    weights = inversion.imprint(target.weights, target.layout, flat, np.random.default_rng(0))
    made = dataclasses.replace(target, weights=weights)
    x, y = drawn(subject, 6, 1)
    update = made.update(x, y, TrainingConfig(learning_rate=1e-6), 0)
    found = inversion.of_units(*made.first_layer(update))
    known = Knowledge(subject.dataset.test_inputs(), subject.dataset.y_test)
    candidates = [known.shaped(each) for each in found]
    assert (known.nearest(candidates, x) > 30).mean() >= 0.5
    assert (known.nearest(candidates, known.examples[:50]) > 20).mean() < 0.05


# --- the search --------------------------------------------------------------------------------


def test_the_truth_breaks_no_bound_and_others_do() -> None:
    torch.manual_seed(0)
    layout = Layout.flat(100)
    bounds = {}
    for name, options in (("uniform", {"bits": 3, "rounding": "dithered"}), ("sign", {})):
        gradient = np.random.default_rng(0).normal(size=100).astype(np.float32)
        payload = fedq.build("codec", name, **options).encode(gradient, layout, 4)
        bounds[name] = inversion._Bounds(cells(payload, layout, gradient), layout)
        truth, other = torch.from_numpy(gradient), torch.randn(100)
        assert float(bounds[name].misfit(truth, "cells")) == 0.0
        assert float(bounds[name].misfit(other, "cells")) > 1e-3
    assert float(bounds["uniform"].misfit(truth, "cosine")) > 1e-3, "levels are not the truth"


def test_fidelity_of_images_and_of_series() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((3, 32, 32)).astype(np.float32)
    noisy = image + rng.normal(0, 0.1, image.shape).astype(np.float32)
    assert decibels(noisy, image, 1.0) == pytest.approx(20, abs=0.3)
    assert decibels(noisy, image, 2.0) == pytest.approx(26, abs=0.3)
    assert similarity(image, image, 1.0) == pytest.approx(1)
    assert similarity(noisy, image, 1.0) < 1
    series = 7 * rng.normal(size=(6, 500)).astype(np.float32)
    assert decibels(series + rng.normal(0, 0.7, series.shape), series, 1.0) == pytest.approx(
        20, abs=0.5
    )
    assert similarity(2 * series + 3, series, 1.0) == pytest.approx(1)


# --- the evaluation ----------------------------------------------------------------------------


def test_single_examples_clients_and_crowds_are_inverted(subject: Subject, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = leaking.by_name(
        SMALL.run(subject, Work(0, tmp_path, 1, lambda done, of: steps.append((done, of))))
    )
    assert steps[-1] == (4, 4)
    closed = found["one example, dense layer"]
    assert closed.status == "measured"
    assert "honest but curious" in closed.threat, "the run's own network starts dense"
    curve = {row["bits"]: row for row in closed.details["by bits of a uniform code"]}
    assert curve[8]["rank one"] > curve[4]["rank one"] > curve[2]["rank one"]
    assert curve[4]["rank one"] > 25, "four bits hide nothing"
    assert closed.value == max(closed.details["by attack"].values())
    assert found["label of one example"].value == 1
    assert found["sum of 5 clients, masked"].twin is not None
    noisy = found["sum of 5 clients, clipped, noisy and masked"]
    assert noisy.value == 0
    assert leaking.by_name(SMALL.run(subject, Work(0, tmp_path, 1))) == found


def test_a_broken_attack_is_invalid(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def useless(weight: Any, bias: Any) -> Any:
        return np.zeros(weight.shape[1])

    monkeypatch.setattr(reconstruction.inversion, "rank_one", useless)
    options = dataclasses.replace(SMALL, searched=0, crowd=0)
    found = leaking.by_name(options.run(subject, Work(0, tmp_path, 1)))
    closed = found["one example, dense layer"]
    assert closed.status == "invalid"
    assert "40 are needed" in closed.reason


def test_a_server_of_sums_has_no_single_updates(tmp_path: Path) -> None:
    masked = leaking.subject(tmp_path / "masked", "secure_aggregation=secagg", "weighting=uniform")
    found = leaking.by_name(SMALL.run(masked, Work(0, tmp_path / "work", 1)))
    assert found["single updates"].status == "skipped"
    assert "sums" in found["single updates"].reason
    assert "a client's whole update" not in found
    assert "sum of 5 clients, masked" in found
    properties = fedq.build("evaluation", "property_inference")
    assert "sums" in properties.unsuitable(masked)


@pytest.mark.parametrize("options", [{"inputs": 1}, {"crowd": 1}, {"iterations": 0}])
def test_a_wrong_budget_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        fedq.build("evaluation", "reconstruction", **options)
