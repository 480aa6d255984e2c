"""Adversarial training: it descends the loss it names, off is off, and what it is for it does."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedq import build, cli, config
from fedq.adversarial import Adversary
from fedq.errors import ConfigError
from fedq.evasion.apgd import Apgd
from fedq.models.base import create
from fedq.robustness.base import Work
from fedq.robustness.evasion import EvasionEvaluation
from fedq.robustness.subject import Subject
from fedq.training import Trainer
from fedq.training_config import TrainingConfig

PGD = TrainingConfig(adversarial_eps=0.1, adversarial_steps=3)
TRADES = TrainingConfig(adversarial_eps=0.1, adversarial_steps=3, trades_beta=6.0)
X = np.random.default_rng(0).random((12, 1, 8, 8), np.float32)
Y = np.arange(12) % 4


def prepared() -> nn.Module:
    return build("quantization", "uniform").prepare(create(build("model", "mlp"), (1, 8, 8), 4))


def test_off_sends_what_it_always_sent() -> None:
    assert TrainingConfig().to_config().keys() == {
        *("local_epochs", "batch_size", "learning_rate", "momentum", "weight_decay"),
        *("proximal_mu", "max_grad_norm"),
    }
    for on in (PGD, TRADES):
        assert TrainingConfig.from_config(on.to_config()) == on


@pytest.mark.parametrize(
    "options",
    [
        {"adversarial_eps": -0.1},
        {"adversarial_eps": math.inf},
        {"adversarial_eps": 0.1, "adversarial_steps": 0},
        {"trades_beta": 6.0},
    ],
)
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TrainingConfig(**options)  # type: ignore[arg-type]


def test_examples_with_noise_of_their_own_have_no_attacker() -> None:
    private = [
        *("experiment=float_baseline", "privacy=example_gaussian", "privacy.noise_multiplier=1"),
    ]
    with pytest.raises(ConfigError, match="adversarial_eps=0"):
        config.load([*private, "adversarial_eps=0.1"])


@pytest.mark.parametrize("training", [PGD, TRADES], ids=["pgd", "trades"])
def test_the_loss_is_at_least_that_of_plain_inputs_and_moves_no_range(
    training: TrainingConfig,
) -> None:
    trainer = Trainer(prepared())
    trainer.train(X, Y, TrainingConfig(local_epochs=20, learning_rate=0.1), seed=0)
    state, weights = trainer.state(), trainer.weights()
    model = trainer.model.eval()
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    plain = functional.cross_entropy(model(x), y)
    adversary = Adversary.of(training, X, seed=0)
    moved = adversary._move(
        model, x, y, lambda z, t: functional.cross_entropy(z, t, reduction="none"), x
    )
    assert (moved - x).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= float(X.min())
    assert moved.max() <= float(X.max())
    assert np.array_equal(trainer.state(), state)
    assert np.array_equal(trainer.weights(), weights)
    _, loss = adversary.loss(model, x, y)
    assert loss > plain


@pytest.mark.parametrize("training", [PGD, TRADES], ids=["pgd", "trades"])
def test_training_is_a_function_of_the_seed(training: TrainingConfig) -> None:
    def train(seed: int) -> np.ndarray:
        trainer = Trainer(prepared())
        start = np.linspace(-0.1, 0.1, trainer.layout.size, dtype=np.float32)
        trainer.load(start)
        return trainer.train(X, Y, training, seed).delta

    assert np.array_equal(train(0), train(0))
    assert not np.array_equal(train(0), train(1))


@pytest.mark.slow
def test_it_raises_the_worst_case_of_the_deployed_model(tmp_path: Path) -> None:
    """The gap was 16 points; half of it leaves room for another machine's rounding."""
    worst = []
    for name, options in (("plain", []), ("robust", ["adversarial_eps=0.15"])):
        path = tmp_path / name
        common = ["data=digits", "model=mlp", "clients=5", "rounds=15", "baseline=false"]
        run = ["simulate", *common, *options, "engine.workers=1", f"run_dir={path}"]
        assert cli.main(run) == 0
        evaluation = EvasionEvaluation(
            test_examples=200, eps=0.15, curve=(), attacks=(Apgd(steps=20),)
        )
        (outcome,) = evaluation.run(Subject.load(path), Work(0, tmp_path))
        assert outcome.value is not None
        worst.append(outcome.value)
    assert worst[1] > worst[0] + 0.08
