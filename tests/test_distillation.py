"""Distillation on the server: from the cohort's models, and into what each width is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch import nn

from fedq import config
from fedq.distillation import Member
from fedq.distillation.feddf import FedDF
from fedq.errors import ConfigError
from fedq.export._source import source
from fedq.read_outs.distilled import Distilled
from fedq.results import read_config, read_model
from fedq.simulation import run_experiment
from fedq.training import Trainer
from fedq.training_config import TrainingConfig

SMALL = (
    *("data=digits", "model=mlp", "model.hidden=[24,16]", "clients=4", "clients_per_round=1.0"),
    *("partition=iid", "baseline=false", "evaluate_every=9", "rounds=2"),
)


def _run(path: Path, *overrides: str) -> dict[str, Any]:
    return run_experiment(config.load([*SMALL, *overrides]), path / "run").summary


def _trainer() -> Trainer:
    return Trainer(nn.Sequential(nn.Linear(3, 2)))


def test_a_student_that_knows_what_it_is_taught_stays() -> None:
    trainer, x = _trainer(), np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    before = trainer.weights()
    trained = trainer.distil(x, trainer.outputs(x), TrainingConfig(learning_rate=1.0), seed=0)
    assert np.abs(trained.delta).max() < 1e-6
    other = before + np.float32(0.5) * np.random.default_rng(1).normal(size=8).astype(np.float32)
    trainer.load(other)
    far = np.square(trainer.outputs(x) - trainer.outputs(x).mean()).mean()
    taught = _trainer().outputs(x)
    gap = np.abs(trainer.outputs(x) - taught).mean()
    trainer.distil(x, taught, TrainingConfig(local_epochs=20, learning_rate=0.3), seed=0)
    assert far > 0
    assert np.abs(_centred(trainer.outputs(x)) - _centred(taught)).mean() < gap / 2


def _centred(logits: Any) -> Any:
    return logits - logits.mean(1, keepdims=True)  # softmax sees no more


def test_an_ensemble_of_the_aggregate_alone_teaches_nothing_new() -> None:
    trainer, x = _trainer(), np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    weights, state = trainer.weights(), trainer.state()
    same = Member(0, weights, state)
    after, _ = FedDF(learning_rate=1.0).refined([trainer], [same, same], weights, state, x, 0)
    np.testing.assert_allclose(after, weights, atol=1e-6)


def test_feddf_is_the_same_for_any_number_of_workers_and_goes_with_pruning(tmp_path: Path) -> None:
    more = (
        *("server_distillation=feddf", "server_distillation.examples=60", "pruning=magnitude"),
        *("pruning.end=1", "quantization=mixed", "codec=top_k_feedback"),
    )
    one, two = (_run(tmp_path / n, *more, f"engine.workers={n}") for n in "12")
    assert one["model_sha256"] == two["model_sha256"]
    plain = _run(tmp_path / "plain", *more[2:], "engine.workers=1")
    assert one["model_sha256"] != plain["model_sha256"]
    weights = load_file(tmp_path / "1" / "run" / "model.safetensors")["fc2.weight"]
    assert (weights == 0).sum() == int(0.8 * weights.size)


def test_every_width_is_read_out_and_can_be_exported(tmp_path: Path) -> None:
    more = ("quantization=mixed", "engine.workers=1", "read_out=distilled", "read_out.examples=200")
    summary = _run(tmp_path, *more)
    served = summary["accuracy_read_out"]
    assert served.keys() == summary["accuracy_by_width"].keys() == {"w8", "w4", "w2"}
    folder = tmp_path / "run" / "read_out" / "w2"
    experiment = config.load_resumed(read_config(folder), [])
    tensors, _ = read_model(folder)
    given = source(experiment, tensors, experiment.quantization)
    assert given.calibrated == 0  # its own ranges
    x, y = given.dataset.test_inputs(), given.dataset.y_test
    assert (given.logits(x).argmax(1) == y).mean() == pytest.approx(served["w2"])
    plain = load_file(tmp_path / "run" / "model.safetensors")
    assert any((plain[name] != tensors[name]).any() for name in tensors if name in plain)


@pytest.mark.parametrize(
    "overrides",
    [
        ["privacy=gaussian", "privacy.epsilon=8"],
        ["secure_aggregation=secagg", "weighting=uniform"],
        ["fleet=pi_shelf", "pacing=fedbuff"],
    ],
)
def test_who_hides_updates_has_no_ensemble(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="server_distillation=feddf asks each client's model"):
        config.load([*SMALL, "server_distillation=feddf", *overrides])


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="examples must be at least 1"):
        FedDF(examples=0)
    with pytest.raises(ConfigError, match="batch_size"):
        Distilled(batch_size=0)
