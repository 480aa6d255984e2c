"""DP-SGD on a client: it is SGD without noise, bounded per example, and refuses what leaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedq import build
from fedq.errors import ConfigError
from fedq.privacy._entropy import Entropy
from fedq.privacy.base import Round
from fedq.private_training import _clipped_sum, _hooked, check, train_privately
from fedq.training import Trainer
from fedq.training_config import TrainingConfig

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 1, 6, 6)).astype(np.float32), RNG.integers(0, 3, 24)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)
    )


def mechanism(**options: Any) -> Any:
    return build("privacy", "example_gaussian", **{"noise_multiplier": 1e-6, **options})


def about(trainer: Trainer, batch_size: int, epochs: int = 1) -> Round:
    return Round(1, 0, 2, trainer.layout.size, batch_size, epochs)


def privately(trainer: Trainer, config: TrainingConfig, privacy: Any, seed: int = 0) -> np.ndarray:
    trained = train_privately(
        trainer,
        X,
        Y,
        config,
        privacy,
        about(trainer, config.batch_size, config.local_epochs),
        Entropy(seed),
    )
    return trained.delta


def test_without_noise_and_clipping_it_is_gradient_descent() -> None:
    config = TrainingConfig(batch_size=24, learning_rate=0.1, local_epochs=3, weight_decay=0.01)
    one, other = Trainer(network()), Trainer(network())
    plain = one.train(X, Y, config, seed=0).delta
    private = privately(other, config, mechanism(clip=1e3, noise_multiplier=1e-9))
    np.testing.assert_allclose(private, plain, rtol=1e-3, atol=1e-6)


def test_each_example_counts_by_its_clipped_gradient() -> None:
    trainer, clip = Trainer(network()), 0.05
    hooked = _hooked(trainer.model)
    total = _clipped_sum(hooked, trainer.task, X, Y, np.arange(24), clip, trainer.layout.size)
    hooked.remove_hooks()
    expected = np.zeros(trainer.layout.size)
    for x, y in zip(X, Y, strict=True):
        trainer.model.zero_grad()
        loss = nn.functional.cross_entropy(
            trainer.model(torch.from_numpy(x[None])), torch.tensor([y])
        )
        loss.backward()
        gradient = np.concatenate([p.grad.flatten().numpy() for p in trainer.model.parameters()])
        expected += gradient * min(1, clip / np.linalg.norm(gradient))
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-7)
    assert np.linalg.norm(total) <= 24 * clip


def test_the_noise_is_the_stated_one() -> None:
    trainer = Trainer(network())
    config = TrainingConfig(batch_size=24, learning_rate=1.0)
    privacy = mechanism(clip=1e-4, noise_multiplier=3.0)
    deltas = np.stack([privately_from_start(trainer, config, privacy, s) for s in range(12)])
    noise = deltas - deltas.mean(axis=0)
    expected = 3.0 * 1e-4 / 24 * np.sqrt(11 / 12)
    assert noise.std() == pytest.approx(expected, rel=0.08)


def privately_from_start(
    trainer: Trainer, config: TrainingConfig, privacy: Any, seed: int
) -> np.ndarray:
    start = Trainer(network()).weights()
    trainer.load(start)
    return privately(trainer, config, privacy, seed)


def test_examples_are_chosen_by_chance_and_a_step_may_have_none() -> None:
    trainer = Trainer(network())
    config = TrainingConfig(batch_size=1, learning_rate=0.1)  # of 24: a third of steps are empty
    one, same = (privately_from_start(trainer, config, mechanism(), 1) for _ in range(2))
    other = privately_from_start(trainer, config, mechanism(), 2)
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_training_leaves_the_network_as_it_was() -> None:
    trainer = Trainer(network())
    privately(trainer, TrainingConfig(batch_size=8), mechanism())
    assert not any(module._forward_hooks for module in trainer.model.modules())
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.train(X, Y, TrainingConfig(batch_size=8), seed=0)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.BatchNorm2d(4), "batch normalisation"),
        (nn.InstanceNorm2d(4, track_running_stats=True), ""),
    ],
)
def test_what_mixes_examples_or_learns_without_noise_is_refused(
    layer: nn.Module, says: str
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ConfigError, match=says or "no noise for"):
        check(Trainer(model), mechanism())


def test_client_level_mechanisms_refuse_batch_normalisation_alone() -> None:
    privacy = build("privacy", "gaussian", noise_multiplier=1.0)
    check(Trainer(build("quantization", "uniform").prepare(network())), privacy)
    with pytest.raises(ConfigError, match="privacy=gaussian needs a model without batch"):
        check(Trainer(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))), privacy)


def test_quantized_training_is_refused_by_name() -> None:
    quantized = build("quantization", "uniform").prepare(network())
    with pytest.raises(ConfigError, match="quantization=none"):
        check(Trainer(quantized), mechanism())
