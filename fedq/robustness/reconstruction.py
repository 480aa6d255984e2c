"""What did it look like? Examples, and their labels, out of encoded updates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedq import registry
from fedq.codecs.base import Codec
from fedq.codecs.error_feedback import ErrorFeedback
from fedq.codecs.identity import Identity
from fedq.codecs.uniform import Uniform
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.privacy._clip import clipped
from fedq.random import derive, generator
from fedq.registry import register
from fedq.results import read_summary
from fedq.robustness import _federation as federation
from fedq.robustness import _inversion as inversion
from fedq.robustness._cells import Cells, cells
from fedq.robustness._fidelity import Example, psnr, similarity
from fedq.robustness._statistics import clopper_pearson, mean
from fedq.robustness.base import Evaluation, Family, Work
from fedq.robustness.outcome import Curve, Gate, Outcome, Plot
from fedq.robustness.subject import Subject
from fedq.training import Trainer, trainer_for
from fedq.training_config import TrainingConfig

#: dB from which an example counts as recovered.
RECOVERED = 20.0
#: dB that the closed form must reach on a float update, and a search above the mean example.
EXACT, ABOVE_MEAN = 40.0, 3.0
#: Bits of the curve's uniform codes, a step per tensor; 0 is float.
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 0)
_HIDDEN, _IMPRINTED = 64, 256
_CURIOUS = "An honest but curious server: it sees the decoded update of a client"
_MALICIOUS = "A server that names a dense network to train, and sees a client's decoded update"
_CRAFTED = "A server that names network, weights and step size so as to keep examples apart"
#: So small that all local steps are taken from the server's weights.
_FROZEN = 1e-6


@register("evaluation", "reconstruction")
class Reconstruction(Evaluation):
    """Gradient inversion of encoded updates: images, series and features, and labels.

    A client with one example trains as the run says, and encodes as the run says. Attacks: the
    first dense layer's closed form; a search for the input whose gradient fits (cosine and total
    variation); each once with the decoded update taken at face value, and once knowing what the
    codec leaves open: intervals of uniform and dithered codes, half lines of signs. Then a client's
    whole update, and masked sums, against a layer made to keep examples apart. PSNR in dB counts
    from the span of the data; images have SSIM beside it, series and features their correlation.

    Where the run's own network starts with a convolution, the closed form is against a dense
    network that the server names instead: servers choose model and training.

    Args:
      inputs: Examples for the closed form and for labels.
      searched: Examples to search for; 0 leaves the search out.
      iterations: Of a search.
      restarts: Of a search; that with the least loss counts.
      crowd: Clients in a masked sum; 0 leaves sums out.
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
        return _Reconstruction(self, subject, work).outcomes()


@dataclass(frozen=True)
class _Target:
    """A network to train, and how inputs of it are spread.

    Attributes:
      trainer: Of the network.
      weights: That the server sends.
      state: Beside them.
    """

    trainer: Trainer
    weights: Vector
    state: Vector

    def update(
        self, x: NDArray[np.float32], y: NDArray[np.int64], training: TrainingConfig, seed: int
    ) -> Vector:
        """Return what training on examples does to the weights."""
        self.trainer.load(self.weights, self.state)
        delta: Vector = self.trainer.train(x, y, training, seed).delta
        return delta


class _Reconstruction:
    def __init__(self, options: Reconstruction, subject: Subject, work: Work) -> None:
        torch.set_num_threads(1)
        self.options, self.subject, self.work = options, subject, work
        self.experiment, data = subject.experiment, subject.dataset
        self.seed = derive(work.seed, "reconstruction")
        rng = generator(derive(self.seed, "inputs"))
        count = min(options.inputs, len(data.y_train))
        rows = rng.choice(len(data.y_train), count, replace=False)
        self.x, self.y = data.train_inputs(rows), data.y_train[rows]
        #: What the attacker knows of such data.
        self.known = data.test_inputs()
        self.span = (float(self.known.min()), float(self.known.max()))
        self.width = max(self.span[1] - self.span[0], 1e-6)
        above = self.known > 0
        self.typical = (
            float(self.known[~above].mean()) if (~above).any() else self.span[0],
            float(self.known[above].mean()) if above.any() else self.span[1],
        )
        self.codec = self._plain(self.experiment.codec)
        self.training = self.experiment.training
        self.frozen = dataclasses.replace(
            self.training, learning_rate=_FROZEN, weight_decay=0.0, proximal_mu=0.0
        )
        self.own = self._target(
            registry.to_config(self.experiment.model),
            registry.to_config(self.experiment.quantization),
        )
        self.dense, self.curious = self._dense()
        self.steps = 3 + options.searched
        self.done = 0

    @staticmethod
    def _plain(codec: Codec) -> Codec:
        """Return the codec of a first round: there is no residual yet."""
        return codec.inner if isinstance(codec, ErrorFeedback) else codec

    def _target(self, model: Any, quantization: Any) -> _Target:
        data = self.subject.dataset
        seed = derive(self.experiment.seed, "model")
        trainer = trainer_for(model, quantization, list(data.input_shape), data.classes, seed=seed)
        return _Target(trainer, trainer.weights(), trainer.state())

    def _dense(self) -> tuple[_Target, bool]:
        """Return a target whose first layer is dense, and whether it is the run's own network."""
        shapes = self.own.trainer.layout.shapes
        size = math.prod(self.subject.dataset.input_shape)
        if len(shapes) > 1 and shapes[0][1:] == (size,) and shapes[1] == shapes[0][:1]:
            return self.own, True
        return self._target({"name": "mlp", "hidden": [_HIDDEN]}, {"name": "none"}), False

    def outcomes(self) -> list[Outcome]:
        """Return all that was found."""
        if reason := federation.masks(self.experiment):
            found = [Outcome(name="single updates", metric="PSNR", status="skipped", reason=reason)]
        else:
            found = self._one_example()
            self._step()
            if self.options.searched:
                found.append(self._searched())
            found.append(self._whole_client())
            self._step()
        if self.options.crowd:
            found += self._sums()
        self._step()
        return found

    def _step(self) -> None:
        self.done += 1
        self.work.step(self.done, self.steps)

    # --- one example, closed form --------------------------------------------------------------

    def _one_example(self) -> list[Outcome]:
        target, layout = self.dense, self.dense.trainer.layout
        surrogate = self._surrogate(target)
        updates = [
            target.update(x[None], y[None], self.training, derive(self.seed, i))
            for i, (x, y) in enumerate(zip(self.x, self.y, strict=True))
        ]
        labels: dict[str, list[bool]] = {}

        def inverted(codec: Codec) -> _Inverted:
            found: dict[str, list[Example]] = {name: [] for name in _CLOSED}
            bits, exact = [], True
            for i, update in enumerate(updates):
                payload = codec.encode(update, layout, derive(self.seed, i, "encode"))
                bits.append(8 * len(payload) / layout.size)
                known = cells(payload, layout, surrogate)
                exact &= known.exact
                for name, x in self._closed(target, known).items():
                    found[name].append(x)
                labels.setdefault(registry.describe(codec), []).append(
                    _label(target.trainer, known.values) == self.y[i]
                )
            return _Inverted(found, float(np.mean(bits)), exact)

        own, plain = inverted(self.codec), inverted(Identity())
        curve = [(bits, inverted(_uniform(bits)) if bits else plain) for bits in WIDTHS]
        decibels = {name: self._decibels(found) for name, found in own.found.items()}
        best = max(decibels, key=lambda name: float(np.mean(decibels[name])))
        estimate = mean(decibels[best])
        clean = float(np.mean(self._decibels(plain.found["rank one"])))
        chance = self._chance(own.found[best])
        similar = [
            similarity(x, truth, self.width)
            for x, truth in zip(own.found[best], self.x, strict=True)
        ]
        threat = (
            f"{_CURIOUS if self.curious else _MALICIOUS}; the client has one example and trains "
            f"{self.training.local_epochs} steps from the first model."
        )
        gates = (
            Gate(
                "positive control",
                clean > EXACT,
                f"a float update is inverted to {clean:.1f} dB; {EXACT:.0f} are needed",
            ),
            chance,
            Gate(
                "codec-aware attack",
                len(own.found["cells"]) == len(self.x),
                f"cells of {registry.describe(self.codec)} are "
                + ("exact" if own.exact else "estimated from simulated errors"),
            ),
        )
        rows = [
            {
                "bits": bits or 32,
                "bits per parameter": one.bits,
                **{name: float(np.mean(self._decibels(x))) for name, x in one.found.items()},
            }
            for bits, one in curve
        ]
        outcome = Outcome(
            name="one example, dense layer",
            metric="PSNR",
            value=estimate.value,
            unit="dB",
            twin=clean,
            interval=estimate.interval,
            bound="lower",
            threat=threat,
            budget={"examples": len(self.x), "attacks": list(_CLOSED)},
            gates=gates,
            details={
                "attack": best,
                "by attack": {name: float(np.mean(values)) for name, values in decibels.items()},
                "best reconstruction": float(np.max(decibels[best])),
                _similar_name(self.x): float(np.mean(similar)),
                "bits per parameter": own.bits,
                "by bits of a uniform code": rows,
            },
            plot=_curve(rows, self.codec, own.bits, estimate.value),
        )
        return [outcome, self._labels(labels)]

    def _closed(self, target: _Target, known: Cells) -> dict[str, Example]:
        """Return reconstructions of the input of a dense first layer by attack."""
        first, second = target.trainer.layout.tensors[:2]
        weight = known.values[first.slice].reshape(first.shape).astype(np.float64)
        bias = known.values[second.slice].astype(np.float64)
        start = inversion.rank_one(weight, bias)
        if np.isfinite(known.high[second.slice]).all():
            aware = inversion.within_cells(known, target.trainer.layout, start, self.span)
        else:
            aware = inversion.from_signs(weight, bias, self.typical)
        found = (inversion.least_squares(weight, bias), start, aware)
        return {name: self._input(x) for name, x in zip(_CLOSED, found, strict=True)}

    def _input(self, x: NDArray[np.float64]) -> Example:
        shaped = np.clip(x, *self.span).reshape(self.subject.dataset.input_shape)
        return shaped.astype(np.float32)

    def _surrogate(self, target: _Target) -> Vector:
        """Return an update of the attacker's own, on an example like those it asks for."""
        rng = generator(derive(self.seed, "surrogate"))
        row = int(rng.integers(len(self.known)))
        y = self.subject.dataset.y_test[row : row + 1]
        return target.update(self.known[row : row + 1], y, self.training, derive(self.seed, "own"))

    def _decibels(self, found: Sequence[Example]) -> NDArray[np.float64]:
        pairs = zip(found, self.x, strict=True)
        return np.array([psnr(x, truth, self.width) for x, truth in pairs])

    def _chance(self, found: Sequence[Example]) -> Gate:
        """Judge each reconstruction by another example: it must not fit."""
        turned = np.roll(self.x, 1, axis=0)
        other = float(np.mean([psnr(a, b, self.width) for a, b in zip(found, turned, strict=True)]))
        return Gate(
            "negative control",
            other <= self._by_mean() + ABOVE_MEAN,
            f"reconstructions fit another example to {other:.1f} dB, the mean example fits to "
            f"{self._by_mean():.1f}",
        )

    def _by_mean(self) -> float:
        """Return the PSNR of knowing nothing but the mean of such data."""
        guess = self.known.mean(axis=0)
        return float(np.mean([psnr(guess, truth, self.width) for truth in self.x]))

    def _labels(self, right: Mapping[str, Sequence[bool]]) -> Outcome:
        own = right[registry.describe(self.codec)]
        estimate = clopper_pearson(sum(own), len(own))
        plain = right[registry.describe(Identity())]
        return Outcome(
            name="label of one example",
            metric="labels inferred",
            value=estimate.value,
            twin=float(np.mean(plain)),
            interval=estimate.interval,
            bound="lower",
            threat=f"{_CURIOUS} that has one example.",
            budget={"examples": len(own)},
            gates=(
                Gate(
                    "positive control",
                    float(np.mean(plain)) > RIGHT,
                    f"{100 * float(np.mean(plain)):.0f} % of the labels of float updates",
                ),
            ),
            details={"by codec": {name: float(np.mean(each)) for name, each in right.items()}},
        )

    # --- one example, searched -----------------------------------------------------------------

    def _searched(self) -> Outcome:
        target, layout = self.own, self.own.trainer.layout
        training = dataclasses.replace(self.training, local_epochs=1)
        threat = f"{_CURIOUS}; the client has one example and takes one step from the first model."
        name = "one example, searched"
        count = min(self.options.searched, len(self.x))
        try:
            surrogate = self._surrogate(target)
        except ConfigError as error:  # batch normalisation does not train on one example
            return Outcome(
                name=name, metric="PSNR", status="skipped", reason=str(error), threat=threat
            )
        decibels: dict[str, list[float]] = {key: [] for key in _SEARCHES}
        similar: list[float] = []
        for i in range(count):
            update = target.update(
                self.x[i : i + 1], self.y[i : i + 1], training, derive(self.seed, i)
            )
            seen = {}
            for codec in (self.codec, Identity()):
                payload = codec.encode(update, layout, derive(self.seed, i, "encode"))
                seen[codec is self.codec] = cells(payload, layout, surrogate).scaled(
                    -1 / training.learning_rate
                )
            label = _label(target.trainer, -seen[True].values)
            for key, (own, loss) in _SEARCHES.items():
                target.trainer.load(target.weights, target.state)
                found = inversion.search(
                    target.trainer.model,
                    seen[own],
                    layout,
                    label,
                    self.subject.dataset.input_shape,
                    self.span,
                    loss,
                    inversion.Search(self.options.iterations, self.options.restarts),
                    generator(derive(self.seed, i, "start")),
                )[0]
                decibels[key].append(psnr(found, self.x[i], self.width))
                if key == "cells":
                    similar.append(similarity(found, self.x[i], self.width))
            self._step()
        best = max(("cosine", "cells"), key=lambda key: float(np.mean(decibels[key])))
        clean = float(np.mean(decibels["float"]))
        estimate = mean(np.array(decibels[best]))
        guess = self._by_mean()
        return Outcome(
            name=name,
            metric="PSNR",
            value=estimate.value,
            unit="dB",
            twin=clean,
            interval=estimate.interval if count > 1 else None,
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
                    f"a float gradient is inverted to {clean:.1f} dB, the mean example fits to "
                    f"{guess:.1f}; {ABOVE_MEAN:.0f} dB more are needed",
                ),
                Gate("codec-aware attack", len(decibels["cells"]) == count, "searched, too"),
            ),
            details={
                "attack": best,
                "by attack": {key: float(np.mean(values)) for key, values in decibels.items()},
                "best reconstruction": float(np.max(decibels[best])),
                _similar_name(self.x): float(np.mean(similar)),
                "mean example": guess,
            },
        )

    # --- many examples -------------------------------------------------------------------------

    def _imprinted(self) -> _Target:
        """Return a target whose first layer keeps examples apart."""
        target = self._target({"name": "mlp", "hidden": [_IMPRINTED]}, {"name": "none"})
        flat = self.known.reshape(len(self.known), -1).astype(np.float64)
        rng = generator(derive(self.seed, "imprint"))
        weights = inversion.imprint(target.weights, target.trainer.layout, flat, rng)
        return dataclasses.replace(target, weights=weights)

    def _candidates(self, target: _Target, update: Vector) -> list[Example]:
        first, second = target.trainer.layout.tensors[:2]
        weight = update[first.slice].reshape(first.shape).astype(np.float64)
        bias = update[second.slice].astype(np.float64)
        return [self._input(x) for x in inversion.of_units(weight, bias)]

    def _nearest(self, found: Sequence[Example], truths: NDArray[np.float32]) -> Any:
        """Return, for each example, the PSNR of the candidate that is nearest to it."""
        if not found:
            return np.zeros(len(truths))
        table = np.stack(found).reshape(len(found), -1).astype(np.float64)
        flat = truths.reshape(len(truths), -1).astype(np.float64)
        errors = np.array([np.square(table - row).mean(axis=1).min() for row in flat])
        return np.minimum(10 * np.log10(self.width**2 / np.maximum(errors, 1e-12)), 100.0)

    def _whole_client(self) -> Outcome:
        """Invert one client's real update: all its rows, all its steps, the run's own codec."""
        data = self.subject.dataset
        sizes = [len(part) for part in self.subject.parts]
        client = int(np.argsort(sizes)[len(sizes) // 2])
        rows = self.subject.parts[client]
        rows = rows if len(rows) else self.subject.parts[int(np.argmax(sizes))]
        x, y = data.train_inputs(rows), data.y_train[rows]
        target = self._imprinted()
        layout = target.trainer.layout
        update = target.update(x, y, self.frozen, derive(self.seed, "client"))
        share, details = {}, {}
        for codec in (self.codec, Identity()):
            payload = codec.encode(update, layout, derive(self.seed, "client", "encode"))
            found = self._candidates(target, codec.decode(payload, layout))
            decibels = self._nearest(found, x)
            share[codec is self.codec] = int((decibels >= RECOVERED).sum())
            details["own codec" if codec is self.codec else "float"] = {
                "mean PSNR": float(decibels.mean()),
                "best PSNR": float(decibels.max()),
                "bits per parameter": 8 * len(payload) / layout.size,
                "examples of others recovered": self._strangers(found),
            }
        estimate = clopper_pearson(share[True], len(x))
        others = details["own codec"]["examples of others recovered"]
        return Outcome(
            name="a client's whole update",
            metric=f"examples recovered to {RECOVERED:.0f} dB",
            value=estimate.value,
            twin=share[False] / len(x),
            interval=estimate.interval,
            bound="lower",
            threat=f"{_CRAFTED} (Robbing the Fed), and sees a client's decoded update.",
            budget={"examples": len(x), "units": _IMPRINTED, "candidates": len(found)},
            gates=(
                Gate(
                    "negative control",
                    others <= NOT_THERE,
                    f"{100 * others:.1f} % of examples that the client has not are 'recovered'",
                ),
            ),
            details=details,
        )

    def _strangers(self, found: Sequence[Example]) -> float:
        """Return the share of examples elsewhere that candidates happen to be near to."""
        return float((self._nearest(found, self.known[:200]) >= RECOVERED).mean())

    def _sums(self) -> list[Outcome]:
        """Invert the sum over clients with an example each: masked, and with noise on it."""
        target, n = self._imprinted(), self.options.crowd
        rng = generator(derive(self.seed, "crowd"))
        data = self.subject.dataset
        rows = rng.choice(len(data.y_train), min(n, len(data.y_train)), replace=False)
        x, y = data.train_inputs(rows), data.y_train[rows]
        layout = target.trainer.layout
        updates = [
            target.update(x[i : i + 1], y[i : i + 1], self.frozen, derive(self.seed, "crowd", i))
            for i in range(len(x))
        ]
        # The server's step size makes updates as long as the run's bound; only ratios matter.
        bound = float(np.median([np.linalg.norm(update) for update in updates]))
        stated = (read_summary(self.subject.path) or {}).get("privacy", {})
        noise = float(stated.get("noise_multiplier", 1.0))

        def total(codec: Codec, protect: Callable[[Vector], Vector]) -> Vector:
            decoded = [
                codec.decode(codec.encode(protect(update), layout, derive(self.seed, i)), layout)
                for i, update in enumerate(updates)
            ]
            return np.asarray(np.sum(decoded, axis=0, dtype=np.float64), np.float32)

        def noisy(update: Vector) -> Vector:
            drawn = noise * bound * rng.standard_normal(update.size)
            return (update + drawn).astype(np.float32)

        def clip(update: Vector) -> Vector:
            return clipped(update, bound)

        plain = self._nearest(self._candidates(target, total(Identity(), np.copy)), x)
        views = {
            "secure aggregation": total(self.codec, np.copy),
            "clipping and secure aggregation": total(self.codec, clip),
            "clipping, noise and secure aggregation": noisy(total(self.codec, clip)),
        }
        outcomes = []
        for name, seen in views.items():
            found = self._candidates(target, seen)
            decibels = self._nearest(found, x)
            estimate = clopper_pearson(int((decibels >= RECOVERED).sum()), len(x))
            others = self._strangers(found)
            outcomes.append(
                Outcome(
                    name=f"sum of {len(x)} clients, {name}",
                    metric=f"examples recovered to {RECOVERED:.0f} dB",
                    value=estimate.value,
                    twin=float((plain >= RECOVERED).mean()),
                    interval=estimate.interval,
                    bound="lower",
                    threat=f"{_CRAFTED}, and sees nothing but the sum over clients that have one "
                    "example each.",
                    budget={"examples": len(x), "units": _IMPRINTED, "candidates": len(found)},
                    gates=(
                        Gate(
                            "negative control",
                            others <= NOT_THERE,
                            f"{100 * others:.1f} % of examples that no client has 'recovered'",
                        ),
                    ),
                    details={
                        "mean PSNR": float(decibels.mean()),
                        "best PSNR": float(decibels.max()),
                        "clip": bound,
                        "noise multiplier": noise if "noise" in name else 0.0,
                    },
                )
            )
        return outcomes


_CLOSED = ("least squares", "rank one", "cells")
_SEARCHES: dict[str, tuple[bool, inversion.Loss]] = {
    "float": (False, "cosine"),
    "cosine": (True, "cosine"),
    "cells": (True, "cells"),
}
#: Share of labels that float updates must tell; of absent examples that may seem recovered.
RIGHT, NOT_THERE = 0.9, 0.05


@dataclass(frozen=True)
class _Inverted:
    """Reconstructions by attack, the mean size of payloads, and whether all cells were exact."""

    found: dict[str, list[Example]]
    bits: float
    exact: bool


def _uniform(bits: int) -> Codec:
    """Return the code of the curve: unbiased, a step per tensor."""
    return Uniform(bits=bits, rounding="nearest" if bits == 1 else "stochastic")


def _label(trainer: Trainer, update: Vector) -> int:
    """Return the class whose output one example's update raises the most.

    Reference:
      Zhao, Mopuri and Bilen 2020, "iDLG: improved deep leakage from gradients", arXiv:2001.02610.
    """
    last = trainer.layout.tensors[-1]
    values = update[last.slice].reshape(last.shape)
    return int(np.argmax(values if values.ndim == 1 else values.sum(axis=1)))


def _similar_name(x: NDArray[np.float32]) -> str:
    return "SSIM" if x.ndim == 4 else "correlation"


def _curve(rows: Sequence[Mapping[str, Any]], codec: Codec, bits: float, value: float) -> Plot:
    curves = [
        Curve(
            name,
            tuple(float(row["bits"]) for row in rows),
            tuple(float(row[name]) for row in rows),
        )
        for name in _CLOSED
    ]
    own = Curve(f"{registry.describe(codec)}, as sent", (bits,), (value,))
    return Plot(
        title="Reconstruction of one example",
        x_label="bits of a uniform code",
        y_label="PSNR in dB",
        curves=(*curves, own),
    )
