"""Accuracy when an attacker changes inputs a little: the worst of several attacks per example.

A model that only hides its gradients must not look robust. The gates follow Carlini et al. 2019
(arXiv:1902.06705) and Croce & Hein 2020 (arXiv:2003.01690).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedq.errors import ConfigError
from fedq.evasion.apgd import Apgd, ApgdTargeted
from fedq.evasion.base import Backward, Ball, Evasion, Norm, Target, cross_entropy
from fedq.evasion.square import Square
from fedq.evasion.transfer import Transfer
from fedq.random import derive
from fedq.registry import describe, register, to_config
from fedq.robustness.base import Evaluation, Family, Work
from fedq.robustness.outcome import Curve, Gate, Outcome, Plot
from fedq.robustness.subject import Subject

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
_BATCH = 250
#: One point: by how much gates let accuracies differ.
TOLERANCE = 0.01
_ZERO_GRADIENTS = 0.05


@dataclass(frozen=True)
class _Model:
    """A network under attack, and what decides whether it was deceived."""

    target: Target
    judge: Callable[[Floats], Floats]


@dataclass(frozen=True)
class _Run:
    """One attack of the sequence: how many examples held before it, and after."""

    attack: Evasion
    before: int
    after: int


@register("evaluation", "evasion")
class EvasionEvaluation(Evaluation):
    """Accuracy of the deployed model under the worst of several attacks on each example.

    Each attack takes up the examples that have withstood those before it. What it finds is put on
    the input grid, back into the ball, and judged by the deployed model; the float twin undergoes
    the same beside it. A curve against the budget is drawn by the first attack alone.

    Args:
      test_examples: At least 20; all if there are fewer.
      norm: Of the ball; attacks that do not work in it are left out.
      eps: Its radius, in units of the network's inputs; None is 0.1 for grey images and for
        standardised inputs, 8/255 for colour, and in ``l2`` that times sqrt(inputs) / 2.
      curve: Further budgets, as multiples of ``eps``.
      attacks: In order; the first must use gradients.
    """

    family: ClassVar[Family] = "evasion"
    test_examples: int = 500
    norm: Norm = "linf"
    eps: float | None = None
    curve: tuple[float, ...] = (0.25, 0.5, 1.5, 2.0)
    attacks: tuple[Evasion, ...] = (Apgd(), ApgdTargeted(), Transfer(), Square())

    def __post_init__(self) -> None:
        if self.test_examples < 20:
            raise ConfigError(
                f"evasion.test_examples must be at least 20, not {self.test_examples}"
            )
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise ConfigError(f"evasion.eps must be positive, or null, not {self.eps}")
        if not all(0 < multiple < math.inf for multiple in self.curve):
            raise ConfigError(f"evasion.curve must hold positive multiples, not {self.curve}")
        if not self.attacks or self.attacks[0].access != "white":
            raise ConfigError("evasion.attacks must begin with one that uses gradients, as apgd")
        for attack in self.attacks:
            attack.check()

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Return the worst case, with the attacks and gates that it rests on."""
        x, y = subject.sample(self.test_examples, derive(work.seed, "examples"))
        ball = self._ball(subject, x)
        attacks = [attack for attack in self.attacks if ball.norm in attack.norms]
        twin = Target(subject.twin_network)
        deployed = _Model(Target(subject.network, subject.twin_network), subject.deployed)
        models = [deployed, _Model(twin, subject.twin_logits)]
        trial = _Trial(subject, x, y, derive(work.seed, "attacks"), work.step)
        budgets = [*sorted({*self.curve} - {1.0}), _diameter(ball, x) / ball.eps]
        naive = subject.quantized
        trial.total = len(models) * (len(attacks) + len(budgets)) + 2 + naive * (len(budgets) + 1)

        first = attacks[0]
        runs, alive = trial.sequence(deployed, attacks, ball)
        _, twin_alive = trial.sequence(models[1], attacks, ball)
        doubled = first.doubled()
        still = trial.withstand(deployed, doubled, ball, alive) if doubled else alive
        worst = [float(still.mean()), float(twin_alive.mean())]
        curves = [trial.curve(model, first, ball, budgets) for model in models]
        gates = (
            trial.masking(deployed, attacks, ball),
            _falls(trial.clean(deployed), curves[0], budgets, runs[0].after / len(y)),
            _strongest(runs, len(y)),
            _converged(doubled, alive, still),
        )
        hidden = []
        if naive:
            blind = _Model(Target(_Blind(subject.network)), subject.deployed)
            hidden = trial.curve(blind, first, ball, [1.0, *budgets])
        return [
            Outcome(
                name=f"worst case, {_NORMS[ball.norm]} {ball.eps:.3g}",
                metric="accuracy under attack",
                value=worst[0],
                twin=worst[1],
                interval=_interval(round(worst[0] * len(y)), len(y)),
                bound="upper",
                threat="Knows weights, quantizers and answers, and changes each input by at most "
                f"{ball.eps:.3g} in {_NORMS[ball.norm]}"
                + (", in steps of the sensor's grid." if subject.pixels else "."),
                budget={"examples": len(y), "attacks": [_spent(attack) for attack in attacks]},
                gates=gates,
                details={"attacks in order": [_row(r, len(y)) for r in runs]},
                plot=_plot(ball, budgets, [trial.clean(m) for m in models], worst, curves, hidden),
            )
        ]

    def _ball(self, subject: Subject, x: Floats) -> Ball:
        eps = self.eps
        if eps is None:
            colour = subject.pixels and subject.dataset.input_shape[0] > 1
            eps = 8 / 255 if colour else 0.1
            if self.norm == "l2":
                eps *= math.sqrt(x[0].size) / 2
        return Ball(self.norm, eps, *((0.0, 1.0) if subject.pixels else (None, None)))


_NORMS = {"linf": "L∞", "l2": "L2"}


class _Trial:
    """Attacks on some examples of a subject."""

    def __init__(
        self,
        subject: Subject,
        x: Floats,
        y: NDArray[np.int64],
        seed: int,
        step: Callable[[int, int], None],
    ) -> None:
        self.subject, self.x, self.y, self.seed = subject, x, y, seed
        self.step, self.done, self.total = step, 0, 0

    def right(self, model: _Model) -> Flags:
        """Return which examples a model gets right."""
        right: Flags = model.judge(self.x).argmax(1) == self.y
        return right

    def clean(self, model: _Model) -> float:
        """Return a model's accuracy without an attack."""
        return float(self.right(model).mean())

    def withstand(self, model: _Model, attack: Evasion, ball: Ball, alive: Flags) -> Flags:
        """Return which of the living examples an attack does not deceive the model about."""
        alive = alive.copy()
        rows = np.flatnonzero(alive)
        seed = derive(self.seed, attack.name, f"{ball.eps:.9g}")
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            x, y = torch.from_numpy(self.x[part]), torch.from_numpy(self.y[part])
            moved = attack(model.target, x, y, ball, derive(seed, start))
            found = self._valid(ball.project(moved, x), x, ball)
            alive[part] = model.judge(found).argmax(1) == self.y[part]
        self.done += 1
        self.step(self.done, self.total)
        return alive

    def sequence(
        self, model: _Model, attacks: Sequence[Evasion], ball: Ball
    ) -> tuple[list[_Run], Flags]:
        """Return what each attack leaves of what the one before it left."""
        alive, runs = self.right(model), []
        for attack in attacks:
            before = int(alive.sum())
            alive = self.withstand(model, attack, ball, alive)
            runs.append(_Run(attack, before, int(alive.sum())))
        return runs, alive

    def curve(
        self, model: _Model, attack: Evasion, ball: Ball, multiples: Sequence[float]
    ) -> list[float]:
        """Return the accuracy under one attack at each multiple of the budget."""
        right = self.right(model)
        balls = [dataclasses.replace(ball, eps=ball.eps * multiple) for multiple in multiples]
        return [float(self.withstand(model, attack, wide, right).mean()) for wide in balls]

    def masking(self, model: _Model, attacks: Sequence[Evasion], ball: Ball) -> Gate:
        """Say for how many examples no attack has a gradient to follow."""
        rows = np.flatnonzero(self.right(model))[:_BATCH]
        x, y = torch.from_numpy(self.x[rows]), torch.from_numpy(self.y[rows])
        generator = torch.Generator().manual_seed(derive(self.seed, "masking"))
        places = (x, ball.start(x, generator))
        ways: dict[Backward, None] = dict.fromkeys(
            getattr(a, "backward", "ste") for a in attacks if a.access == "white"
        )
        shares = []
        for way in ways:
            gradients = [model.target.climb(at, y, cross_entropy, way)[2] for at in places]
            zero = torch.stack([~g.flatten(1).bool().any(1) for g in gradients]).float()
            shares.append(float(zero.mean()) if len(rows) else 0.0)
        share = min(shares)
        return Gate(
            "gradients not masked",
            share < _ZERO_GRADIENTS,
            f"{100 * share:.0f} % of the gradients are zero ({', '.join(ways)})",
        )

    def _valid(self, moved: Tensor, x: Tensor, ball: Ball) -> Floats:
        """Return inputs that the sensor can give, still in the ball."""
        if not self.subject.pixels:
            return np.ascontiguousarray(moved.numpy())
        own, codes = x.numpy().astype(np.float64) * 255, moved.numpy().astype(np.float64) * 255
        codes = np.rint(codes)
        if ball.norm == "linf":
            reach = 255 * ball.eps + 1e-6
            codes = codes.clip(np.ceil(own - reach), np.floor(own + reach))
        else:  # too long once rounded: towards the original
            change = codes - np.rint(own)
            lengths = np.sqrt(np.square(change).reshape(len(own), -1).sum(1)) / 255
            shorter = np.rint(own) + np.trunc(255 * (moved - x).numpy().astype(np.float64))
            out = (lengths > ball.eps).reshape(-1, *[1] * (own.ndim - 1))
            codes = np.where(out, shorter, codes)
        return self.subject.on_grid(codes / 255)


class _Blind(nn.Module):
    """A network as an integer runtime offers it to autograd: outputs, and a gradient of zero."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x.detach()) + 0.0 * x.flatten(1).sum(1, keepdim=True)
        return out


# --- gates ---------------------------------------------------------------------------------------


def _falls(clean: float, curve: Sequence[float], budgets: Sequence[float], at_one: float) -> Gate:
    """Say whether accuracy falls with the budget, to nothing where anything may be changed."""
    places = sorted([(0.0, clean), (1.0, at_one), *zip(budgets, curve, strict=True)])
    rises = [b - a for (_, a), (_, b) in itertools.pairwise(places)]
    last, rise = places[-1][1], max(rises)
    return Gate(
        "accuracy falls to 0 with the budget",
        last <= TOLERANCE and rise <= TOLERANCE,
        f"{100 * last:.1f} % is left where any input may become any other; between two budgets it "
        f"rises by at most {100 * max(rise, 0):.1f} points",
    )


def _strongest(runs: Sequence[_Run], examples: int) -> Gate:
    """Say how many examples only attacks without the model's own gradients could break."""
    others = [run for run in runs if run.attack.access != "white"]
    extra = sum(run.before - run.after for run in others)
    names = " and ".join(run.attack.name for run in others)
    return Gate(
        "gradients are no weaker than guesses",
        bool(others) and extra <= max(TOLERANCE * examples, 1),
        f"{names}, without the model's gradients: {100 * extra / examples:.1f} points more"
        if others
        else "no attack without the model's gradients was tried",
    )


def _converged(doubled: Evasion | None, alive: Flags, still: Flags) -> Gate:
    if doubled is None:
        return Gate("attacks have converged", False, "the first attack has no steps to double")
    extra = int(alive.sum() - still.sum())
    return Gate(
        "attacks have converged",
        extra <= max(TOLERANCE * len(alive), 1),
        f"twice the steps of {doubled.name}: {100 * extra / len(alive):.1f} points more",
    )


# --- what is shown -------------------------------------------------------------------------------


def _diameter(ball: Ball, x: Floats) -> float:
    """Return the budget with which any input of the data may become any other."""
    span = float(x.max() - x.min()) if ball.low is None or ball.high is None else 1.0
    return span if ball.norm == "linf" else span * math.sqrt(x[0].size)


def _interval(count: int, examples: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    found = binomtest(count, examples).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def _spent(attack: Evasion) -> str:
    """Return an attack in one line, with its steps or queries even where they are the default."""
    options = to_config(attack)
    told = [f"{key}={options[key]}" for key in ("steps", "queries") if key in options]
    text = describe(attack)
    return " ".join([text, *(item for item in told if item not in text)])


def _row(run: _Run, examples: int) -> dict[str, Any]:
    return {
        "attack": _spent(run.attack),
        "access": run.attack.access,
        "tried on": run.before,
        "broken": run.before - run.after,
        "accuracy after, %": round(100 * run.after / examples, 1),
    }


def _plot(
    ball: Ball,
    budgets: Sequence[float],
    clean: Sequence[float],
    worst: Sequence[float],
    curves: Sequence[Sequence[float]],
    hidden: Sequence[float],
) -> Plot:
    """Draw accuracy against the budget, up to the largest of the curve's."""
    shown = budgets[:-1]  # the last is the diameter

    def line(label: str, at_zero: float, at_one: float, rest: Sequence[float]) -> Curve:
        points = sorted([(0.0, at_zero), (1.0, at_one), *zip(shown, rest, strict=False)])
        lowest, held = 1.0, []
        for _, accuracy in points:  # what a smaller budget breaks, a larger one does
            lowest = min(lowest, accuracy)
            held.append(100 * lowest)
        own = label == "deployed"
        return Curve(label, tuple(m * ball.eps for m, _ in points), tuple(held), dashed=not own)

    lines = [
        line("deployed", clean[0], worst[0], curves[0]),
        line("float twin", clean[1], worst[1], curves[1]),
    ]
    if hidden:
        lines.append(line("naive attack (masked)", clean[0], hidden[0], hidden[1:]))
    return Plot(
        "Accuracy by budget", f"largest change ({_NORMS[ball.norm]})", "accuracy, %", tuple(lines)
    )
