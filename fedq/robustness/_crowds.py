"""Examples out of updates that many of them made: a client's whole update, and masked sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.layout import Vector
from fedq.privacy._clip import clipped
from fedq.random import derive, generator
from fedq.results import read_summary
from fedq.robustness import _inversion as inversion
from fedq.robustness._fidelity import Example
from fedq.robustness._statistics import clopper_pearson
from fedq.robustness._victims import Knowledge, Target, drawn, sent
from fedq.robustness.outcome import Gate, Outcome
from fedq.robustness.subject import Subject

_UNITS = 256
#: A step so small that all local steps are taken from the server's weights.
_FROZEN = 1e-6
#: Share of absent examples that may seem recovered.
NOT_THERE = 0.05
_STRANGERS = 200
_CRAFTED = (
    "A server that names network, weights and step size so as to keep examples apart (Robbing the "
    "Fed)"
)


class Crowds:
    """Attacks with a first layer that sorts examples by their mean.

    Args:
      subject: The run, whose codec and local epochs are used.
      known: What the attacker knows of such data.
      seed: Of all that is random.
    """

    def __init__(self, subject: Subject, known: Knowledge, seed: int) -> None:
        self.subject, self.known, self.seed = subject, known, seed
        self.codec = sent(subject.experiment.codec)
        self.training = dataclasses.replace(
            subject.experiment.training,
            learning_rate=_FROZEN,
            weight_decay=0.0,
            proximal_mu=0.0,
        )
        target = Target.dense(subject, _UNITS)
        flat = known.examples.reshape(len(known.examples), -1).astype(np.float64)
        weights = inversion.imprint(
            target.weights, target.layout, flat, generator(derive(seed, "imprint"))
        )
        self.target = dataclasses.replace(target, weights=weights)

    @property
    def metric(self) -> str:
        """What outcomes count."""
        return f"examples recovered to {self.known.recovered:.0f} dB"

    def whole_client(self) -> Outcome:
        """Attack the update of the client with the median number of examples, all its steps."""
        data = self.subject.dataset
        parts = sorted((part for part in self.subject.parts if len(part)), key=len)
        rows = parts[len(parts) // 2]
        x, y = data.train_inputs(rows), data.y_train[rows]
        update = self.target.update(x, y, self.training, derive(self.seed, "client"))
        layout = self.target.layout
        plain = self._candidates(update)
        payload = self.codec.encode(update, layout, derive(self.seed, "client", "encode"))
        return self._outcome(
            "a client's whole update",
            f"{_CRAFTED}, and sees a client's decoded update.",
            self._candidates(self.codec.decode(payload, layout)),
            x,
            plain,
            {"bits per parameter": 8 * len(payload) / layout.size},
        )

    def sums(self, clients: int) -> list[Outcome]:
        """Attack the sum over clients with one example each: masked, clipped, and with noise."""
        x, y = drawn(self.subject, clients, derive(self.seed, "crowd"))
        updates = [
            self.target.update(x[i : i + 1], y[i : i + 1], self.training, derive(self.seed, i))
            for i in range(len(x))
        ]
        # The server's step size makes updates as long as the run's bound: only ratios matter.
        bound = float(np.median([np.linalg.norm(update) for update in updates]))
        stated = (read_summary(self.subject.path) or {}).get("privacy", {})
        multiplier = float(stated.get("noise_multiplier", 1.0))

        def clip(update: Vector) -> Vector:
            return clipped(update, bound)

        plain = self._candidates(np.sum(updates, axis=0))
        masked, bounded = self._total(updates, np.copy), self._total(updates, clip)
        noise = generator(derive(self.seed, "noise")).standard_normal(bounded.size)
        noisy = (bounded + multiplier * bound * noise).astype(np.float32)
        views = {
            "masked": (masked, {}),
            "clipped and masked": (bounded, {"clip": bound}),
            "clipped, noisy and masked": (
                noisy,
                {"clip": bound, "noise multiplier": multiplier},
            ),
        }
        return [
            self._outcome(
                f"sum of {len(x)} clients, {name}",
                f"{_CRAFTED}, and sees nothing but the sum over clients that have one example "
                "each.",
                self._candidates(seen),
                x,
                plain,
                how,
            )
            for name, (seen, how) in views.items()
        ]

    def _total(self, updates: Sequence[Vector], protect: Callable[[Vector], Vector]) -> Vector:
        layout = self.target.layout
        decoded = [
            self.codec.decode(
                self.codec.encode(protect(update), layout, derive(self.seed, i, "encode")), layout
            )
            for i, update in enumerate(updates)
        ]
        return np.asarray(np.sum(decoded, axis=0, dtype=np.float64), np.float32)

    def _candidates(self, update: Vector) -> list[Example]:
        found = inversion.of_units(*self.target.first_layer(update))
        return [self.known.shaped(x) for x in found]

    def _outcome(
        self,
        name: str,
        threat: str,
        candidates: list[Example],
        x: NDArray[np.float32],
        plain: list[Example],
        how: dict[str, Any],
    ) -> Outcome:
        known = self.known
        decibels, clean = known.nearest(candidates, x), known.nearest(plain, x)
        estimate = clopper_pearson(int((decibels >= known.recovered).sum()), len(x))
        absent = known.nearest(candidates, known.examples[:_STRANGERS])
        others = float((absent >= known.recovered).mean())
        exact = float((clean >= known.recovered).mean())
        return Outcome(
            name=name,
            metric=self.metric,
            value=estimate.value,
            twin=exact,
            interval=estimate.interval,
            bound="lower",
            threat=threat,
            budget={"examples": len(x), "units": _UNITS, "candidates": len(candidates)},
            gates=(
                Gate(
                    "positive control",
                    exact > NOT_THERE,
                    f"{100 * exact:.0f} % of the examples are recovered from float updates",
                ),
                Gate(
                    "negative control",
                    others <= NOT_THERE,
                    f"{100 * others:.1f} % of examples that nobody has are 'recovered'",
                ),
            ),
            details={
                f"mean {known.measure}": float(decibels.mean()),
                f"best {known.measure}": float(decibels.max()),
                f"mean {known.measure}, float": float(clean.mean()),
                **how,
            },
        )
