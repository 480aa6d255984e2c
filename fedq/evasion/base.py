"""What every evasion attack is: a frozen configuration that moves inputs within a ball."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedq.errors import ConfigError

Norm = Literal["linf", "l2"]
#: ``white``: gradients; ``transfer``: gradients of another network; ``black``: outputs alone.
Access = Literal["white", "transfer", "black"]
#: How gradients pass quantizers; see :meth:`Target.climb`.
Backward = Literal["ste", "bpda"]
#: Of logits (n, classes) and labels (n,) to what the attacker wants large, (n,).
Loss = Callable[[Tensor, Tensor], Tensor]
#: Spread of an example's logits above which they are cooled: softmax would round to 0 and 1, and
#: the gradient to 0 (Gupta & Ajanthan 2022, "Improved gradient-based adversarial attacks for
#: quantized networks", AAAI, arXiv:2003.13511).
COOL = 20.0


@dataclass(frozen=True)
class Ball:
    """The changes that an attacker may make.

    Attributes:
      norm: ``linf``: no coordinate moves by more than ``eps``; ``l2``: the Euclidean norm.
      eps: Radius, in units of the network's inputs.
      low: Least valid input; None if there is no limit.
      high: Largest valid input; None if there is no limit.

    Example:
      >>> ball = Ball("linf", 0.1, 0.0, 1.0)
      >>> ball.project(torch.tensor([[0.95, 0.5]]) + 0.3, torch.tensor([[0.95, 0.5]]))
      tensor([[1.0000, 0.6000]])
    """

    norm: Norm
    eps: float
    low: float | None = None
    high: float | None = None

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """Return ``moved`` put back into the ball about ``x`` and into the box."""
        change = moved - x
        if self.norm == "linf":
            change = change.clamp(-self.eps, self.eps)
        else:
            change = change * (self.eps / self.lengths(change)).clamp(max=1.0)
        return self.box(x + change)

    def box(self, x: Tensor) -> Tensor:
        """Return ``x`` clipped to valid inputs."""
        return x if self.low is None and self.high is None else x.clamp(self.low, self.high)

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the step of norm 1 that climbs most; 0 where there is no gradient."""
        return gradient.sign() if self.norm == "linf" else gradient / self.lengths(gradient)

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random point of the ball and the box, for each example."""
        if self.norm == "linf":
            noise = 2 * torch.rand(x.shape, generator=generator) - 1
        else:
            noise = torch.randn(x.shape, generator=generator)
            radius = torch.rand(len(x), generator=generator) ** (1 / max(x[0].numel(), 1))
            noise = noise / self.lengths(noise) * radius.reshape(-1, *[1] * (x.dim() - 1))
        return self.project(x + self.eps * noise, x)

    @staticmethod
    def lengths(x: Tensor) -> Tensor:
        """Return Euclidean norms per example, to divide by, (n, 1, ...)."""
        norms: Tensor = x.flatten(1).norm(dim=1).clamp_min(1e-12)
        return norms.reshape(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True, eq=False)
class Target:
    """A network as an attacker sees it.

    Attributes:
      network: Its outputs; gradients pass quantizers by the straight-through estimator.
      twin: A smooth stand-in of the same shape: what ``bpda`` differentiates, and what attacks
        transfer from. None if there is none.
    """

    network: nn.Module
    twin: nn.Module | None = None

    def logits(self, x: Tensor) -> Tensor:
        """Return the outputs, (n, classes), without a gradient."""
        with torch.no_grad():
            out: Tensor = self.network(x)
        return out

    def climb(
        self, x: Tensor, y: Tensor, loss: Loss, backward: Backward = "ste"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs, the losses (n,) and the losses' gradient by the inputs.

        ``bpda`` computes the loss of the network, and passes its gradient back through the twin
        (Athalye et al. 2018, ICML, arXiv:1802.00420), for estimators that vanish where a quantizer
        saturates.
        """
        x = x.detach().requires_grad_(True)
        if backward == "ste" or self.twin is None:
            logits = self.network(x)
            losses = loss(logits, y)
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        else:
            logits = self.logits(x).requires_grad_(True)
            losses = loss(logits, y)
            (outer,) = torch.autograd.grad(losses.sum(), logits)
            (gradient,) = torch.autograd.grad(self.twin(x), x, outer)
        return logits.detach(), losses.detach(), gradient


class Evasion(abc.ABC):
    """An attack on inputs: ``attack(target, x, y, ball, seed)`` gives inputs of the same shape.

    Attributes:
      access: What it needs to know.
      norms: Balls that it works in.
    """

    group: ClassVar[str] = "evasion"
    name: ClassVar[str]
    access: ClassVar[Access]
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abc.abstractmethod
    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        """Return an input in the ball about each of ``x``, misclassified if one was found.

        Args:
          target: Whom to attack; its parameters must not require gradients, or they waste time.
          x: (n, ...) inputs, n at least 1, which the target gets right.
          y: (n,) labels.
          ball: What may be changed.
          seed: Of all its randomness.
        """

    def check(self) -> None:  # noqa: B027 - most need nothing
        """Raise :class:`ConfigError` if what the attack needs is not installed."""

    def doubled(self) -> Self | None:
        """Return the attack with twice the steps, to see whether it has converged."""
        steps = getattr(self, "steps", None)
        return dataclasses.replace(self, steps=2 * steps) if steps else None  # type: ignore[type-var]


def at_least(name: str, **values: int) -> None:
    """Raise :class:`ConfigError` for options below 1."""
    for option, value in values.items():
        if value < 1:
            raise ConfigError(f"{name}.{option} must be at least 1, not {value}")


# --- losses --------------------------------------------------------------------------------------


def cooled(logits: Tensor) -> Tensor:
    """Return logits divided by a temperature, per example, where softmax would saturate."""
    spread = logits.detach().amax(1, keepdim=True) - logits.detach().amin(1, keepdim=True)
    return logits / (spread / COOL).clamp_min(1.0)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each example, of cooled logits."""
    return functional.cross_entropy(cooled(logits), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return how far the best wrong class leads; positive where the answer is wrong."""
    right = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return wrong - right


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio (Croce & Hein 2020, equation 6), free of scale.

    With two classes there is no third to divide by, and it is the margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(goal: Tensor) -> Loss:
    """Return the loss that leads to class ``goal``, (n,) (Croce & Hein 2020, equation 7)."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        right = logits.gather(1, y[:, None]).squeeze(1)
        wanted = logits.gather(1, goal[:, None]).squeeze(1)
        if logits.shape[1] < 4:
            return wanted - right
        top = logits.topk(4, dim=1).values
        return (wanted - right) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    return loss


LOSSES: Mapping[str, Loss] = {"cross_entropy": cross_entropy, "dlr": dlr}
