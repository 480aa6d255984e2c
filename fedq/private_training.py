"""DP-SGD on a client: gradients per example from Opacus, secret noise from fedq.

Opacus's own optimiser draws noise from torch's generator, which is no secret; its hooks are what is
used here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.privacy._entropy import Entropy
from fedq.privacy._samplers import MAX_TABLE_SIGMA
from fedq.privacy.base import Privacy, Round
from fedq.privacy.example_gaussian import ExampleGaussian
from fedq.privacy.gaussian import GRID, noisy_sum
from fedq.tasks.base import Task
from fedq.training import Diverged, Trained, Trainer, _batches, _Sgd
from fedq.training_config import TrainingConfig

#: Values of gradients per example that are held at once, 32 MiB in float64.
GRADIENT_VALUES = 1 << 22
#: What a coarse grid, which is faster to sample, may add to the noise.
TOLERANCE = 0.02


def check(trainer: Trainer, privacy: Privacy) -> None:
    """Refuse a model that a mechanism cannot protect, or leaves useless.

    Raises:
      ConfigError: For batch normalisation, whose statistics have no noise and are not sent; for
        example-level privacy also for running ranges and layers Opacus has no hooks for.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in trainer.model.modules()):
        raise ConfigError(
            f"privacy={privacy.name} needs a model without batch normalisation, whose statistics "
            "mix examples and have no noise; choose another model, or group normalisation in yours"
        )
    if privacy.unit != "example":
        return
    if trainer.state_layout.size:
        raise ConfigError(
            f"privacy=example_gaussian has no noise for {', '.join(trainer.state_layout.names[:2])}"
            "..., which training changes beside the weights; choose quantization=none"
        )
    _hooked(trainer.model).remove_hooks()


def _hooked(model: nn.Module) -> Any:
    try:
        from opacus import GradSampleModule
    except ImportError:
        raise ConfigError(
            "privacy=example_gaussian needs Opacus; pip install 'fedq[privacy-example]'"
        ) from None
    try:
        return GradSampleModule(model, loss_reduction="sum")
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"Opacus cannot train this model by examples: {error}") from None


def train_privately(
    trainer: Trainer,
    x: NDArray[np.float32],
    y: NDArray[Any],
    config: TrainingConfig,
    privacy: ExampleGaussian,
    about: Round,
    entropy: Entropy,
) -> Trained:
    """Train from the loaded weights with DP-SGD; the loss, which has no noise, is not reported.

    Args:
      trainer: With the round's model; see :func:`check` for which.
      x: (n, ...) examples, channels first.
      y: (n, ...) truths of the trainer's task.
      config: Batches, epochs and steps; what it does beyond the gradient follows the noise.
      privacy: The mechanism.
      about: The round.
      entropy: Of the choice of examples and the noise.

    Raises:
      ConfigError: If the model cannot be trained so.
      Diverged: If the weights are not finite.
    """
    check(trainer, privacy)
    y = trainer.task.truths(x, y)
    start = trainer.weights()
    weights, gradient = torch.from_numpy(start.copy()), torch.zeros(start.size)
    step = _Sgd(config, weights, gradient)
    share, steps = privacy.sampling(len(x), about)
    coarse = privacy.sigma * math.sqrt(start.size) <= TOLERANCE * MAX_TABLE_SIGMA
    hooked = _hooked(trainer.model)
    try:
        hooked.train()
        for _ in range(steps):
            trainer.load(weights.numpy())
            chosen = np.flatnonzero(entropy.uniform(len(x)) < share)
            total = _clipped_sum(hooked, trainer.task, x, y, chosen, privacy.clip, start.size)
            noisy = noisy_sum(
                total,
                privacy.clip,
                privacy.sigma,
                0,  # in float64, nothing is rounded that counts
                entropy,
                MAX_TABLE_SIGMA if coarse else GRID,
            )
            gradient.copy_(torch.from_numpy(noisy / (share * len(x))))
            step()
    finally:
        hooked.remove_hooks()
        _forget(trainer.model.parameters())
    delta: Vector = weights.numpy() - start
    if not np.isfinite(delta).all():
        raise Diverged("private training diverged; lower learning_rate or privacy.noise_multiplier")
    return Trained(delta, trainer.state(), len(x), math.nan, steps)


def _clipped_sum(
    hooked: Any,
    task: Task,
    x: NDArray[np.float32],
    y: NDArray[Any],
    chosen: NDArray[np.int64],
    clip: float,
    size: int,
) -> NDArray[np.float64]:
    """Return the sum of the chosen examples' gradients, each of norm ``clip`` at most, (d,)."""
    total = np.zeros(size)
    if not len(chosen):
        return total
    parameters = [p for p in hooked._module.parameters() if p.requires_grad]
    with warnings.catch_warnings():  # inputs need no gradient, which torch remarks on
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for inputs, truths in _batches(x, y, chosen, max(1, min(64, GRADIENT_VALUES // size))):
            loss = task.loss(hooked(inputs), inputs, truths, "sum")
            loss.backward()  # type: ignore[no-untyped-call]
            samples = [p.grad_sample.flatten(1) for p in parameters]
            rows = torch.cat(samples, dim=1).double()
            factors = clip / torch.linalg.vector_norm(rows, dim=1).clamp_min(clip)
            total += (factors @ rows).numpy()
            _forget(parameters)
    return total


def _forget(parameters: Iterable[Any]) -> None:
    """Drop gradients, of which Opacus would else keep a sum."""
    for parameter in parameters:
        parameter.grad_sample = parameter.grad = None
