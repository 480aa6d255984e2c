"""Corruptions change inputs, more with each severity, and nothing but the inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedq import cli
from fedq.data.base import Kind
from fedq.errors import ConfigError
from fedq.random import generator
from fedq.robustness._corruptions import CORRUPTIONS, SEVERITIES, Corruption, _coarser
from fedq.robustness.base import Work
from fedq.robustness.corruption import CorruptionEvaluation
from fedq.robustness.subject import Subject


def inputs(kind: Kind) -> np.ndarray:
    """Smooth inputs with something to spoil in all of them."""
    rng = np.random.default_rng(0)
    if kind == "image":
        waves = np.sin(np.arange(28) / 4 + rng.uniform(0, 6, (20, 3, 28, 1)))
        return 0.5 + 0.5 * waves * np.cos(np.arange(28) / 5)
    if kind == "series":
        return 3 * np.sin(np.arange(60) / 5 + rng.uniform(0, 6, (20, 3, 1)))
    return rng.standard_normal((20, 12))


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: f"{c.kind}-{c.name}")
def test_each_severity_is_worse_than_the_last(corruption: Corruption) -> None:
    x = inputs(corruption.kind)
    before = x.copy()
    moved = [corruption(x, severity, generator(1)) for severity in SEVERITIES]
    assert np.array_equal(x, before)
    for changed in moved:
        assert changed.shape == x.shape
        assert np.isfinite(changed).all()
        if corruption.kind == "image":
            assert changed.min() >= 0
            assert changed.max() <= 1
    distances = [float(np.square(changed - x).mean()) for changed in moved]
    assert distances[0] > 0
    assert distances == sorted(distances)
    assert np.array_equal(moved[2], corruption(x, 3, generator(1)))


@pytest.mark.parametrize("side", [5, 28])
@pytest.mark.parametrize("fewer", [1, 3, 5])
def test_coarser_pixels_keep_a_constant_and_are_piecewise_constant(side: int, fewer: int) -> None:
    matrix = _coarser(side, fewer)
    assert matrix.sum(1) == pytest.approx(np.ones(side))
    assert len(np.unique(matrix, axis=0)) == fewer


def test_every_kind_of_data_has_corruptions() -> None:
    assert {c.kind for c in CORRUPTIONS} == {"image", "series", "features"}


def test_the_mean_error_is_relative_to_the_float_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["data=digits", "clients=5", "rounds=6", "model=mlp", "baseline=false"]
    assert cli.main(["simulate", *options, "engine.workers=1", f"run_dir={tmp_path}"]) == 0
    subject = Subject.load(tmp_path)
    work = Work(0, tmp_path)
    overall, *categories = CorruptionEvaluation(test_examples=60).run(subject, work)
    assert overall.value == pytest.approx(1.0, abs=0.2)
    assert overall.status == "measured"
    values = [outcome.value for outcome in categories]
    assert values == sorted(values, key=lambda value: value or 0.0)
    # A model that is always wrong has as many errors as there are examples.
    monkeypatch.setattr(
        Subject, "deployed", lambda self, x: np.eye(10, dtype=np.float32)[np.full(len(x), 3)]
    )
    wrong, *_ = CorruptionEvaluation(test_examples=60).run(subject, work)
    assert wrong.value is not None
    assert wrong.value > 1.5
    with pytest.raises(ConfigError, match="at least 20"):
        CorruptionEvaluation(test_examples=3)
