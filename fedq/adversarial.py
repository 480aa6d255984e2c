"""Adversarial training on a client, by PGD or TRADES, of the network with its quantizers.

Madry et al. 2018, ICLR, arXiv:1706.06083; Zhang et al. 2019, ICML, arXiv:1901.08573.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedq.evasion.base import Ball, Loss, Target, cross_entropy
from fedq.random import derive
from fedq.training_config import TrainingConfig

_NEAR = 1e-3  # where TRADES starts: at the input itself the divergence has no gradient


@dataclass(frozen=True, eq=False)
class Adversary:
    """An attacker that moves each batch before a step.

    Attributes:
      ball: How far; inputs stay in the range of the client's own.
      steps: Gradients per batch.
      beta: Weight of TRADES' divergence; 0 is PGD training.
      generator: Of the starting points.
    """

    ball: Ball
    steps: int
    beta: float
    generator: torch.Generator

    @classmethod
    def of(cls, config: TrainingConfig, x: NDArray[np.float32], seed: int) -> Adversary:
        """Return the attacker of a client's training; ``x`` are its inputs."""
        ball = Ball("linf", config.adversarial_eps, float(x.min()), float(x.max()))
        generator = torch.Generator().manual_seed(derive(seed, "adversary"))
        return cls(ball, config.adversarial_steps, config.trades_beta, generator)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of a batch and the loss to descend, both differentiable.

        PGD: outputs and cross-entropy of the moved inputs. TRADES: outputs and cross-entropy of the
        plain ones, plus ``beta KL(plain || moved)``.
        """
        if not self.beta:
            logits = model(
                self._move(model, x, y, cross_entropy, self.ball.start(x, self.generator))
            )
            return logits, functional.cross_entropy(logits, y)
        noise = torch.randn(x.shape, generator=self.generator)
        start = self.ball.project(x + _NEAR * noise, x)
        model.eval()
        with torch.no_grad():
            plain = model(x).log_softmax(1)
        moved = self._move(model, x, y, lambda logits, _: _divergence(plain, logits), start)
        logits = model(x)
        apart = _divergence(logits.log_softmax(1), model(moved)).mean()
        return logits, functional.cross_entropy(logits, y) + self.beta * apart

    def _move(self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss, at: Tensor) -> Tensor:
        """Return inputs of large loss; meanwhile no range and no statistic changes."""
        model.eval()
        size = 2.5 * self.ball.eps / self.steps
        for _ in range(self.steps):
            _, _, gradient = Target(model).climb(at, y, loss)
            at = self.ball.project(at + size * self.ball.direction(gradient), x)
        model.train()
        return at


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(reference || logits) per example, the reference as log-probabilities."""
    moved = logits.log_softmax(1)
    return functional.kl_div(moved, reference, reduction="none", log_target=True).sum(1)
