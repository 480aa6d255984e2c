"""What kind of data has this client? Its mix of classes, out of one encoded update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.privacy._entropy import Entropy
from fedq.privacy.base import Round
from fedq.random import derive, generator, round_seed
from fedq.registry import register
from fedq.robustness import _federation as federation
from fedq.robustness._statistics import auc
from fedq.robustness.base import Evaluation, Family, Work
from fedq.robustness.outcome import Gate, Outcome
from fedq.robustness.subject import Subject

#: AUC on the attacker's own simulated clients, in float, below which the attack itself is broken.
WORKS = 0.8
SURE = 0.999
_RIDGE = 1e-3
_MIXES = (0.1, 0.3, 1.0, 10.0)  # Dirichlet concentrations of simulated clients
_HELD_OUT = 4  # one in so many simulated clients judges the attack

Matrix = NDArray[np.float64]


@register("evaluation", "property_inference")
class PropertyInference(Evaluation):
    """Property inference: which classes a client has more of than the federation.

    The attacker simulates clients of many mixes from data of its own, trains and encodes as the run
    does, and fits a ridge regression from the decoded update of the last layer to the mix. It is
    then shown the first round's updates of the run's own clients.

    Args:
      clients: Of the run, at most.
      simulated: Clients that the attacker trains on.

    Reference:
      Melis et al. 2019, "Exploiting unintended feature leakage in collaborative learning", IEEE
      S&P; Wainakh et al. 2022, "User-level label leakage from gradients", PoPETs.
    """

    family: ClassVar[Family] = "privacy"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"clients": 10, "simulated": 24})

    clients: int = 50
    simulated: int = 100

    def __post_init__(self) -> None:
        if self.clients < 2:
            raise ConfigError(f"clients must be at least 2, not {self.clients}")
        if self.simulated < 2 * _HELD_OUT:
            raise ConfigError(f"simulated must be at least {2 * _HELD_OUT}, not {self.simulated}")

    def unsuitable(self, subject: Subject) -> str:
        """Name runs without single updates to look at, or with too few clients."""
        if reason := federation.masks(subject.experiment):
            return reason
        if len([part for part in subject.parts if len(part)]) < 2:
            return "fewer than two clients have data"
        return ""

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Fit on simulated clients, and ask of the run's own."""
        torch.set_num_threads(1)
        return [_Properties(self, subject, work).outcome()]


class _Properties:
    def __init__(self, options: PropertyInference, subject: Subject, work: Work) -> None:
        self.options, self.subject, self.work = options, subject, work
        self.experiment, self.data = subject.experiment, subject.dataset
        self.seed = derive(work.seed, "property_inference")
        self.trainer = federation.trainer_of(self.experiment, self.data)
        self.start = self.trainer.weights(), self.trainer.state()
        self.parts = federation.clients(self.experiment, self.data)[: options.clients]
        self.prior = np.bincount(self.data.y_train, minlength=self.data.classes) / len(
            self.data.y_train
        )
        self.done = 0

    def outcome(self) -> Outcome:
        """Return how well over-represented classes are told."""
        simulated = self._simulated()
        own = [
            self._seen(self.data.train_inputs(rows), self.data.y_train[rows], client)
            for client, rows in enumerate(self.parts)
        ]
        truth = np.stack([self._mix(self.data.y_train[rows]) for rows in self.parts])
        areas, errors, works = {}, {}, 0.0
        for twin in (False, True):
            features = np.stack([pair[twin] for pair, _ in simulated])
            mixes = np.stack([mix for _, mix in simulated])
            held = np.arange(len(mixes)) % _HELD_OUT == 0
            if twin:
                guess = _ridge(features[~held], mixes[~held], features[held])
                works = auc(*self._sides(guess, mixes[held])).value
            guess = _ridge(features, mixes, np.stack([pair[twin] for pair in own]))
            areas[twin] = auc(*self._sides(guess, truth))
            errors[twin] = float(np.abs(guess - truth).sum(axis=1).mean() / 2)
            if not twin:
                other = np.roll(guess, 1, axis=0)
                chance = auc(*self._sides(other, truth), confidence=SURE)
        return Outcome(
            name="over-represented classes",
            metric="AUC",
            value=areas[False].value,
            unit="AUC",
            twin=areas[True].value,
            interval=areas[False].interval,
            bound="lower",
            threat="An honest but curious server with data of its own: it sees one decoded update "
            "of each client, in the first round.",
            budget={"clients": len(self.parts), "simulated clients": len(simulated)},
            gates=(
                Gate(
                    "positive control",
                    works > WORKS,
                    f"on held-out simulated clients, in float, AUC {works:.3f}; above {WORKS} is "
                    "needed",
                ),
                Gate(
                    "negative control",
                    chance.holds(0.5),
                    f"judged by another client's data, AUC {chance.value:.3f}; the interval "
                    f"{chance.low:.3f} to {chance.high:.3f} must hold 0.5",
                ),
            ),
            details={
                "total variation from the true mix": errors[False],
                "total variation, float": errors[True],
                "total variation of guessing the federation's mix": float(
                    np.abs(self.prior - truth).sum(axis=1).mean() / 2
                ),
            },
        )

    def _simulated(self) -> list[tuple[tuple[Matrix, Matrix], Matrix]]:
        """Return the attacker's own clients: features, quantized and in float, and mixes."""
        found = []
        x, y = self.data.test_inputs(), self.data.y_test
        sizes = [len(rows) for rows in self.parts]
        for index in range(self.options.simulated):
            rng = generator(derive(self.seed, "simulated", index))
            wanted = rng.dirichlet(self.prior * self.data.classes * _MIXES[index % len(_MIXES)])
            chances = wanted[y] / np.bincount(y, minlength=self.data.classes)[y]
            rows = rng.choice(len(y), sizes[index % len(sizes)], p=chances / chances.sum())
            found.append((self._seen(x[rows], y[rows], -1 - index), self._mix(y[rows])))
            self.done += 1
            self.work.step(self.done, self.options.simulated)
        return found

    def _mix(self, labels: NDArray[np.int64]) -> Matrix:
        return np.bincount(labels, minlength=self.data.classes) / len(labels)

    def _sides(self, guess: Matrix, truth: Matrix) -> tuple[Matrix, Matrix]:
        """Return the scores of classes that clients have more of than the federation, and less."""
        more = truth > self.prior
        scores = guess - self.prior
        return scores[more], scores[~more]

    def _seen(
        self, x: NDArray[np.float32], y: NDArray[np.int64], client: int
    ) -> tuple[Matrix, Matrix]:
        """Train as a client of the first round; return features as decoded, and in float."""
        experiment, layout = self.experiment, self.trainer.layout
        self.trainer.load(*self.start)
        seed = derive(self.seed, client, "train")
        delta = self.trainer.train(x, y, experiment.training, seed).delta
        about = Round(1, experiment.seed, len(self.parts), layout.size)
        privacy = experiment.privacy.at(experiment.privacy.initial())
        delta = privacy.protect(delta, about, Entropy(seed)).delta
        code = experiment.codec.client_seed(round_seed(experiment.seed, 1), abs(client))
        decoded = experiment.codec.decode(experiment.codec.encode(delta, layout, code), layout)
        return self._features(decoded), self._features(delta)

    def _features(self, delta: Vector) -> Matrix:
        """Return what an update does to each output: its bias, and the sum of its weights."""
        last = self.trainer.layout.tensors[-1]
        part = [delta[last.slice].reshape(last.shape)]
        if len(last.shape) == 1 and len(self.trainer.layout.tensors) > 1:
            weight = self.trainer.layout.tensors[-2]
            part.append(delta[weight.slice].reshape(weight.shape[0], -1).sum(axis=1))
        flat = np.concatenate([p.reshape(p.shape[0], -1).sum(axis=1) for p in part])
        size = float(np.linalg.norm(flat))
        return np.asarray(flat / size if size else flat, np.float64)


def _ridge(x: Matrix, y: Matrix, asked: Matrix) -> Matrix:
    """Return the ridge regression's guesses of (n, classes) mixes."""
    mean, scale = x.mean(axis=0), max(math.sqrt(float(x.var())), 1e-12)

    def columns(features: Matrix) -> Matrix:
        return np.column_stack([(features - mean) / scale, np.ones(len(features))])

    table = columns(x)
    penalty = _RIDGE * len(x) * np.eye(table.shape[1])
    found: Matrix = columns(asked) @ np.linalg.solve(table.T @ table + penalty, table.T @ y)
    return found
