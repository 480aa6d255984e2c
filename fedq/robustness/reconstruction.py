"""What did it look like? Examples, and their labels, out of encoded updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedq import registry
from fedq.codecs.base import Codec
from fedq.codecs.identity import Identity
from fedq.codecs.uniform import Uniform
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.random import derive, generator
from fedq.registry import register
from fedq.robustness import _federation as federation
from fedq.robustness import _inversion as inversion
from fedq.robustness._cells import Cells
from fedq.robustness._crowds import Crowds
from fedq.robustness._fidelity import Example
from fedq.robustness._statistics import clopper_pearson, mean
from fedq.robustness._victims import Knowledge, Target, Wire, drawn, sent
from fedq.robustness.base import Evaluation, Family, Work
from fedq.robustness.outcome import Curve, Gate, Outcome, Plot
from fedq.robustness.subject import Subject

#: dB that the closed form must reach on a float update, and a search above the mean example.
EXACT, ABOVE_MEAN = 40.0, 3.0
#: Share of labels that float updates must tell.
RIGHT = 0.9
#: Bits of the curve's uniform codes, a step per tensor; 32 is float.
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 32)
ATTACKS = ("least squares", "rank one", "cells")
#: By name: whether the own codec is seen or float, and the loss.
SEARCHES: dict[str, tuple[bool, inversion.Loss]] = {
    "float": (False, "cosine"),
    "cosine": (True, "cosine"),
    "cells": (True, "cells"),
}
_HIDDEN = 64
#: Examples from which an interval is worth stating.
_ENOUGH = 5
_CURIOUS = "An honest but curious server: it sees the decoded update of a client"
_NAMING = "A server that names a dense network to train, and sees a client's decoded update"


@register("evaluation", "reconstruction")
class Reconstruction(Evaluation):
    """Gradient inversion of encoded updates: images, series and features, and labels.

    A client with one example trains as the run says, and encodes as the run says. Attacks: the
    first dense layer's closed form; a search for the input whose gradient fits (cosine and total
    variation); each once with the decoded update taken at face value, and once knowing what the
    codec leaves open: intervals of uniform and dithered codes, half lines of signs. Then a client's
    whole update, and masked sums, against a layer made to keep examples apart. Fidelity is PSNR,
    beside it SSIM, for images; SNR and correlation for series and features.

    Where the run's own network starts with a convolution, the closed form is against a dense
    network that the server names instead: servers choose model and training.

    Args:
      inputs: Examples for the closed form and for labels.
      searched: Examples to search for; 0 leaves the search out.
      iterations: Of a search.
      restarts: Of a search; that with the least loss counts.
      crowd: Clients in a masked sum; 0 leaves crowds out.

    Reference:
      Zhu et al. 2019, "Deep leakage from gradients"; Geiping et al. 2020, "Inverting gradients: how
      easy is it to break privacy in federated learning?".
    """

    family: ClassVar[Family] = "reconstruction"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"inputs": 4, "searched": 0, "crowd": 0},
    )

    inputs: int = 16
    searched: int = 3
    iterations: int = 600
    restarts: int = 2
    crowd: int = 10

    def __post_init__(self) -> None:
        for option, least in (("inputs", 2), ("searched", 0), ("iterations", 1), ("restarts", 1)):
            if getattr(self, option) < least:
                raise ConfigError(f"{option} must be at least {least}, not {getattr(self, option)}")
        if self.crowd == 1 or self.crowd < 0:
            raise ConfigError(f"crowd must be 0 or at least 2, not {self.crowd}")

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Encode updates of single examples, of a client and of a crowd, and invert them."""
        torch.set_num_threads(1)
        seed = derive(work.seed, "reconstruction")
        known = Knowledge(subject.dataset.test_inputs(), subject.dataset.y_test)
        found: list[Outcome] = []
        steps = 2 + self.searched
        if reason := federation.masks(subject.experiment):
            found.append(_skipped("single updates", known, reason, _CURIOUS))
        else:
            single = _Single(self, subject, known, seed)
            found += single.inverted()
            work.step(1, steps)
            if self.searched:
                found.append(single.searched(lambda done: work.step(1 + done, steps)))
        if self.crowd:
            crowds = Crowds(subject, known, seed)
            if not reason:
                found.append(crowds.whole_client())
            found += crowds.sums(self.crowd)
        work.step(steps, steps)
        return found


def closed_form(target: Target, seen: Cells, known: Knowledge) -> dict[str, Example]:
    """Return the input of a dense first layer, by attack.

    Args:
      target: The network.
      seen: One example's update.
      known: What the attacker knows of such data.
    """
    weight, bias = target.first_layer(seen.values)
    start = inversion.rank_one(weight, bias)
    if np.isfinite(seen.high[target.layout.tensors[1].slice]).all():
        aware = inversion.within_cells(seen, target.layout, start, known.span)
    else:
        aware = inversion.from_signs(weight, bias, known.typical)
    flat = (inversion.least_squares(weight, bias), start, aware)
    return {name: known.shaped(x) for name, x in zip(ATTACKS, flat, strict=True)}


@dataclass(frozen=True)
class Inverted:
    """What the closed form gets out of updates.

    Attributes:
      found: Reconstructions by attack.
      labels: Inferred ones.
      bits: Mean bits per parameter.
      exact: Whether the codec's cells are known, not estimated.
    """

    found: dict[str, list[Example]]
    labels: list[int]
    bits: float
    exact: bool


def invert(
    target: Target, wire: Wire, updates: Sequence[Vector], known: Knowledge, seed: int
) -> Inverted:
    """Encode each of some updates, and invert what is seen of it."""
    found: dict[str, list[Example]] = {name: [] for name in ATTACKS}
    labels, bits, exact = [], [], True
    for i, update in enumerate(updates):
        seen, size = wire.seen(update, derive(seed, i, "encode"))
        for name, x in closed_form(target, seen, known).items():
            found[name].append(x)
        labels.append(target.label(seen.values))
        bits.append(size)
        exact &= seen.exact
    return Inverted(found, labels, float(np.mean(bits)), exact)


class _Single:
    """Attacks on clients with one example."""

    def __init__(
        self, options: Reconstruction, subject: Subject, known: Knowledge, seed: int
    ) -> None:
        self.options, self.subject, self.known, self.seed = options, subject, known, seed
        self.x, self.y = drawn(subject, options.inputs, derive(seed, "inputs"))
        self.codec = sent(subject.experiment.codec)
        self.training = subject.experiment.training
        self.own = Target.own(subject)

    def _surrogate(self, target: Target, training: Any) -> Vector:
        """Return an update of the attacker's own."""
        x, y = self.known.examples[:1], self.known.labels[:1]
        return target.update(x, y, training, derive(self.seed, "surrogate"))

    # --- closed form ---------------------------------------------------------------------------

    def inverted(self) -> list[Outcome]:
        """Return what the closed form, and the last layer's signs, tell."""
        curious = self.own.starts_dense
        target = self.own if curious else Target.dense(self.subject, _HIDDEN)
        surrogate = self._surrogate(target, self.training)
        updates = [
            target.update(self.x[i : i + 1], self.y[i : i + 1], self.training, derive(self.seed, i))
            for i in range(len(self.x))
        ]

        def over(codec: Codec) -> Inverted:
            wire = Wire(codec, target.layout, surrogate)
            return invert(target, wire, updates, self.known, self.seed)

        own = over(self.codec)
        curve = {bits: over(_uniform(bits)) for bits in WIDTHS}
        threat = (
            f"{_CURIOUS if curious else _NAMING}; the client has one example and takes "
            f"{self.training.local_epochs} steps from the first model."
        )
        return [self._pictures(own, curve, threat), self._labels(own, curve)]

    def _pictures(self, own: Inverted, curve: Mapping[int, Inverted], threat: str) -> Outcome:
        known = self.known
        by_attack = {name: known.decibels(found, self.x) for name, found in own.found.items()}
        best = max(by_attack, key=lambda name: float(by_attack[name].mean()))
        estimate = mean(by_attack[best])
        clean = float(known.decibels(curve[32].found["rank one"], self.x).mean())
        other = float(known.decibels(own.found[best], np.roll(self.x, 1, axis=0)).mean())
        guess = known.guess(self.x)
        rows = [
            {"bits": bits, "bits per parameter": one.bits}
            | {name: float(known.decibels(x, self.x).mean()) for name, x in one.found.items()}
            for bits, one in curve.items()
        ]
        gates = (
            Gate(
                "positive control",
                clean > EXACT,
                f"float updates are inverted to {clean:.1f} dB; {EXACT:.0f} are needed",
            ),
            Gate(
                "negative control",
                other <= guess + ABOVE_MEAN,
                f"reconstructions fit another example to {other:.1f} dB, the mean example fits to "
                f"{guess:.1f}",
            ),
            Gate(
                "codec-aware attack",
                len(own.found["cells"]) == len(self.x),
                f"cells of {registry.describe(self.codec)} are "
                + ("exact" if own.exact else "estimated from simulated errors"),
            ),
        )
        return Outcome(
            name="one example, dense layer",
            metric=known.measure,
            value=estimate.value,
            unit="dB",
            twin=clean,
            interval=estimate.interval,
            bound="lower",
            threat=threat,
            budget={"examples": len(self.x), "attacks": list(ATTACKS)},
            gates=gates,
            details={
                "attack": best,
                "by attack": {name: float(values.mean()) for name, values in by_attack.items()},
                "best reconstruction": float(by_attack[best].max()),
                known.likeness: known.alike(own.found[best], self.x),
                "bits per parameter": own.bits,
                "mean example": guess,
                "by bits of a uniform code": rows,
            },
            plot=self._plot(rows, own.bits, estimate.value),
        )

    def _plot(self, rows: Sequence[Mapping[str, Any]], bits: float, value: float) -> Plot:
        coded = [row for row in rows if row["bits"] < 32]
        curves = [
            Curve(
                f"{name}, uniform codes of 1 to 8 bits",
                tuple(float(row["bits per parameter"]) for row in coded),
                tuple(float(row[name]) for row in coded),
            )
            for name in ATTACKS
        ]
        return Plot(
            title="Reconstruction of one example",
            x_label="bits per parameter, as sent",
            y_label=f"{self.known.measure} in dB",
            curves=(*curves, Curve(registry.describe(self.codec), (bits,), (value,))),
        )

    def _labels(self, own: Inverted, curve: Mapping[int, Inverted]) -> Outcome:
        def share(inverted: Inverted) -> float:
            return float(np.mean(np.array(inverted.labels) == self.y))

        right = int((np.array(own.labels) == self.y).sum())
        estimate = clopper_pearson(right, len(self.y))
        clean = share(curve[32])
        return Outcome(
            name="label of one example",
            metric="labels inferred",
            value=estimate.value,
            twin=clean,
            interval=estimate.interval,
            bound="lower",
            threat=f"{_CURIOUS} that has one example.",
            budget={"examples": len(self.y)},
            gates=(
                Gate(
                    "positive control",
                    clean > RIGHT,
                    f"{100 * clean:.0f} % of the labels are told by float updates",
                ),
            ),
            details={"by bits of a uniform code": {str(b): share(one) for b, one in curve.items()}},
        )

    # --- search --------------------------------------------------------------------------------

    def searched(self, step: Any) -> Outcome:
        """Return what a search for inputs of the run's own network finds."""
        known, target = self.known, self.own
        training = dataclasses.replace(self.training, local_epochs=1)
        name = "one example, searched"
        threat = f"{_CURIOUS}; the client has one example and takes one step from the first model."
        try:
            surrogate = self._surrogate(target, training)
        except ConfigError as error:  # batch normalisation does not train on one example
            return _skipped(name, known, str(error), threat)
        wires = [Wire(codec, target.layout, surrogate) for codec in (Identity(), self.codec)]
        count = min(self.options.searched, len(self.x))
        found: dict[str, list[Example]] = {attack: [] for attack in SEARCHES}
        for i in range(count):
            x, y = self.x[i : i + 1], self.y[i : i + 1]
            update = target.update(x, y, training, derive(self.seed, i))
            seen = [wire.seen(update, derive(self.seed, i, "encode"))[0] for wire in wires]
            label = target.label(seen[True].values)
            for attack, (coded, loss) in SEARCHES.items():
                gradient = seen[coded].scaled(-1 / training.learning_rate)
                found[attack].append(self._search(gradient, label, loss, derive(self.seed, i)))
            step(1 + i)
        truths = self.x[:count]
        by_attack = {attack: known.decibels(each, truths) for attack, each in found.items()}
        best = max(("cosine", "cells"), key=lambda attack: float(by_attack[attack].mean()))
        estimate, clean = mean(by_attack[best]), float(by_attack["float"].mean())
        guess = known.guess(truths)
        return Outcome(
            name=name,
            metric=known.measure,
            value=estimate.value,
            unit="dB",
            twin=clean,
            interval=estimate.interval if count >= _ENOUGH else None,
            bound="lower",
            threat=threat,
            budget={
                "examples": count,
                "iterations": self.options.iterations,
                "restarts": self.options.restarts,
            },
            gates=(
                Gate(
                    "positive control",
                    clean > guess + ABOVE_MEAN,
                    f"float gradients are inverted to {clean:.1f} dB, the mean example fits to "
                    f"{guess:.1f}; {ABOVE_MEAN:.0f} dB more are needed",
                ),
                Gate("codec-aware attack", len(found["cells"]) == count, "cells were searched"),
            ),
            details={
                "attack": best,
                "by attack": {key: float(values.mean()) for key, values in by_attack.items()},
                "best reconstruction": float(by_attack[best].max()),
                known.likeness: known.alike(found[best], truths),
                "mean example": guess,
            },
        )

    def _search(self, gradient: Cells, label: int, loss: inversion.Loss, seed: int) -> Example:
        self.own.trainer.load(self.own.weights, self.own.state)
        found: NDArray[np.float32] = inversion.search(
            self.own.trainer.model,
            gradient,
            self.own.layout,
            label,
            self.subject.dataset.input_shape,
            self.known.span,
            loss,
            inversion.Search(self.options.iterations, self.options.restarts),
            generator(derive(seed, "start")),
        )
        return np.asarray(found[0])


def _uniform(bits: int) -> Codec:
    """Return a code of the curve: unbiased, a step per tensor."""
    if bits == 32:
        return Identity()
    return Uniform(bits=bits, rounding="nearest" if bits == 1 else "stochastic")


def _skipped(name: str, known: Knowledge, reason: str, threat: str) -> Outcome:
    return Outcome(name=name, metric=known.measure, status="skipped", reason=reason, threat=threat)
