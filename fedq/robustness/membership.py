"""Was this example trained on? Asked of a run's model, its recipe, its rounds and its updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedq.engines.recorder import Seen
from fedq.errors import ConfigError
from fedq.export._source import outputs
from fedq.random import derive, generator
from fedq.registry import register
from fedq.results import read_summary
from fedq.robustness import _federation as federation
from fedq.robustness import _inference as inference
from fedq.robustness import _shadows
from fedq.robustness._inference import Inside, Signals
from fedq.robustness._statistics import NEEDED, auc, roc, tpr_at
from fedq.robustness.base import Evaluation, Family, Work
from fedq.robustness.outcome import Curve, Gate, Outcome, Plot
from fedq.robustness.subject import Subject
from fedq.training_config import TrainingConfig

#: False-positive rates that true-positive rates are stated at.
RATES = (0.01, 0.001)
#: AUC that every attack must reach on an overfitted model.
OVERFITTED = 0.9
#: Confidence of gates on intervals: a sound evaluation fails one in a thousand.
SURE = 0.999
COMPARED = "comparison of clients"
#: Clients of a round that can be compared.
_FEWEST = 4
_CONTROL_ROWS, _CONTROL_SHADOWS, _CONTROL_EPOCHS, _KNOWN = 120, 4, 60, 0.05
_BY_HEART = TrainingConfig(
    local_epochs=5, batch_size=10, learning_rate=0.05, momentum=0.9, max_grad_norm=2.0
)

#: Scores of members and of others.
Sides = tuple[Signals, Signals]


@register("evaluation", "membership")
class Membership(Evaluation):
    """Membership inference on the final model, per-round models and observed updates.

    Shadow federations run the run's own recipe (model, quantization, codec, aggregation, privacy,
    rounds) on random halves of its training and test rows. Signals are of quantized networks, with
    their float twins beside them; the run's own final model is the deployed integer one. Attacks:
    loss threshold (Yeom et al. 2018), LiRA offline and online (Carlini et al. 2022), RMIA
    (Zarifzadeh et al. 2024); on updates, comparison with other clients' (FedMIA, Zhu et al. 2025).

    Four questions: the run's own final model; its recipe, with every shadow a target in turn, which
    has many more non-members; the global models of its rounds; the updates that its server saw.

    Args:
      shadows: Federations to run, even and at least 4; each costs what the run cost.
      checkpoints: Rounds whose global models are attacked together; 0 leaves them out.
      observed: Rounds whose updates are attacked; 0 leaves them out.
    """

    family: ClassVar[Family] = "membership"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"shadows": 4, "checkpoints": 0, "observed": 0},
    )

    shadows: int = 16
    checkpoints: int = 4
    observed: int = 3

    def __post_init__(self) -> None:
        if self.shadows < 4 or self.shadows % 2:
            raise ConfigError(f"shadows must be even and at least 4, not {self.shadows}")
        for option in ("checkpoints", "observed"):
            if getattr(self, option) < 0:
                raise ConfigError(f"{option} must not be negative, not {getattr(self, option)}")

    def unsuitable(self, subject: Subject) -> str:
        """Name runs whose shadows would be of another kind, and data too small to say anything."""
        if subject.experiment.attack.fraction > 0:
            return "the run was attacked while it trained; membership is asked of honest runs"
        if len(subject.experiment.quantization.variants) > 1:
            return "clients of several widths train several models; ask it of a run of one width"
        if min(len(subject.dataset.y_test), len(subject.dataset.y_train)) < 2 * NEEDED:
            return f"fewer than {2 * NEEDED} examples on either side say nothing"
        return ""

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Train the shadows that are not there yet, attack, and judge the attacks by controls."""
        return _Inference(self, subject, work).outcomes()


def attacks(
    target: Signals, shadows: Signals, inside: Inside, population: NDArray[np.int64]
) -> dict[str, Signals]:
    """Return every attack's scores, (n,), of a target with some models given shadows of each.

    Args:
      target: (r, n) signals of the target's models, one or one per round.
      shadows: (s, r, n) of the shadows'.
      inside: (s, n) who trained on what.
      population: Rows that RMIA compares with.
    """
    models = [(target[r], shadows[:, r]) for r in range(len(target))]
    return {
        "loss threshold": inference.over_rounds([own for own, _ in models]),
        "LiRA offline": inference.over_rounds(
            [inference.lira(own, others, inside, online=False) for own, others in models]
        ),
        "LiRA online": inference.over_rounds(
            [inference.lira(own, others, inside) for own, others in models]
        ),
        "RMIA": inference.over_rounds(
            [inference.rmia(own, others, inside, population) for own, others in models]
        ),
    }


def sides(scores: Signals, members: Inside, asked: Inside | None = None) -> Sides:
    """Return the scores of members and of others, without those that an attack cannot tell."""
    known = ~np.isnan(scores) if asked is None else ~np.isnan(scores) & asked
    return scores[known & members], scores[known & ~members]


class _Inference:
    """One evaluation under way."""

    def __init__(self, options: Membership, subject: Subject, work: Work) -> None:
        torch.set_num_threads(1)
        self.options, self.subject, self.work = options, subject, work
        self.pool = federation.Pool(subject.dataset, work.seed)
        self.seed = derive(work.seed, "membership")
        rounds = subject.experiment.rounds
        self.checkpoints = _spread(2, rounds, options.checkpoints)
        self.observed = _spread(1, rounds, options.observed)
        self.steps = options.shadows + 2
        self.population = np.arange(len(self.pool.labels))

    # --- models --------------------------------------------------------------------------------

    @cached_property
    def trained(self) -> list[_shadows.Answers | None]:
        """What every shadow federation says, None where it gave no model."""
        shadows = _shadows.Shadows(
            self.subject.experiment,
            self.pool,
            self.checkpoints,
            self.work.folder,
            self.work.workers,
        )
        rng = generator(derive(self.seed, "halves"))
        insides = inference.balanced(self.options.shadows, len(self.pool.labels), rng)
        found = []
        for index, inside in enumerate(insides):
            self.work.step(index, self.steps)
            found.append(shadows.answers(derive(self.seed, "shadow", index), inside))
        return found

    @cached_property
    def kept(self) -> dict[int, _shadows.Answers]:
        """Those that did not diverge, by place."""
        return _shadows.sound(self.trained)

    @cached_property
    def shadows(self) -> list[_shadows.Answers]:
        """The same in order."""
        return list(self.kept.values())

    @cached_property
    def inside(self) -> Inside:
        """Who of them trained on what, (s, n)."""
        return np.stack([shadow.inside for shadow in self.shadows])

    def others(self, kind: str) -> Signals:
        """Return signals of the shadows' models, (s, r, n)."""
        return np.stack([shadow.of(kind) for shadow in self.shadows])

    @cached_property
    def watched(self) -> _Watched:
        """The run's own federation once more, as its server sees it."""
        self.work.step(self.options.shadows, self.steps)
        watched = _Watched(self.subject, self.checkpoints, self.observed)
        watched.run(self.work)
        return watched

    # --- outcomes ------------------------------------------------------------------------------

    def outcomes(self) -> list[Outcome]:
        """Return all that was found."""
        shadows = self.shadows
        self.budget = {
            "shadow federations": len(self.trained),
            "diverged": len(self.trained) - len(shadows),
            "rows": len(self.pool.labels),
        }
        found: list[Outcome] = []
        watched = self.watched if self.checkpoints or self.observed else None
        self.work.step(self.options.shadows + 1, self.steps)
        gates = (self._positive(), self._negative())
        found += self._final(gates)
        found += self._recipe(gates)
        if watched is not None and self.checkpoints:
            found += self._rounds(watched, gates)
        if watched is not None and self.observed:
            found += self._updates(watched)
        self.work.step(self.steps, self.steps)
        return found

    def _final(self, gates: tuple[Gate, ...]) -> list[Outcome]:
        x = self.pool.inputs
        signals = {
            "deployed": inference.confidence(self.subject.deployed(x), self.pool.labels),
        }
        with self.subject.twin() as network:
            signals["twin"] = inference.confidence(outputs(network, x), self.pool.labels)
        judged = {
            kind: self._judged(own[None], kind, self.pool.members) for kind, own in signals.items()
        }
        threat = (
            "Whoever holds the deployed model, knows its recipe and has data like its own; asks "
            "whether given examples were trained on."
        )
        return _outcomes("final model", judged, gates, threat, self.budget)

    def _judged(self, own: Signals, kind: str, members: Inside) -> dict[str, Sides]:
        scores = attacks(own, self.others(kind), self.inside, self.population)
        return {name: sides(values, members) for name, values in scores.items()}

    def _recipe(self, gates: tuple[Gate, ...]) -> list[Outcome]:
        """Attack every shadow by the others: as many non-members as the pool's half, times them."""
        judged: dict[str, dict[str, Sides]] = {}
        for kind in ("deployed", "twin"):
            each = [self._of_shadow(index, kind) for index in range(len(self.shadows))]
            judged[kind] = {
                name: _pooled(
                    sides(scores[name], shadow.inside)
                    for scores, shadow in zip(each, self.shadows, strict=True)
                )
                for name in each[0]
            }
        threat = (
            "As above, of models trained like this one on random halves of its data: what the "
            "recipe leaks on average, members and others alike in number and kind."
        )
        return _outcomes("recipe", judged, gates, threat, self.budget)

    def _of_shadow(self, index: int, kind: str) -> dict[str, Signals]:
        """Return the scores of every row for one shadow, from the others but its other half.

        With that half, how many shadows hold a row would tell whether the target does.
        """
        pairs = np.array(list(self.kept)) // 2
        rest = pairs != pairs[index]
        return attacks(
            self.shadows[index].of(kind),
            self.others(kind)[rest],
            self.inside[rest],
            self.population,
        )

    def _rounds(self, watched: _Watched, gates: tuple[Gate, ...]) -> list[Outcome]:
        judged = {
            kind: self._judged(own, rounds, self.pool.members)
            for kind, rounds, own in (
                ("deployed", "rounds", watched.rounds.stacked(twin=False)),
                ("twin", "rounds_twin", watched.rounds.stacked(twin=True)),
            )
        }
        threat = (
            "Any client: it is sent the global model in every round, and knows recipe and data "
            "like the run's own."
        )
        budget = {**self.budget, "rounds": self.checkpoints}
        return _outcomes("rounds", judged, (*gates, watched.repeated), threat, budget)

    def _updates(self, watched: _Watched) -> list[Outcome]:
        threat = (
            "An honest but curious server: it sees the decoded update of each client, and asks "
            "which of some examples of the same classes are that client's."
        )
        budget = {"rounds": self.observed, "updates": watched.updates}
        if not watched.updates:
            return [
                Outcome(
                    name="observed updates",
                    metric="AUC",
                    status="skipped",
                    reason="the server of this run sees sums of updates only",
                    threat=threat,
                )
            ]
        judged = {"deployed": watched.judged(False), "twin": watched.judged(True)}
        return _outcomes("observed updates", judged, watched.gates, threat, budget)

    # --- controls ------------------------------------------------------------------------------

    def _positive(self) -> Gate:
        """Attack a network that has learnt random labels by heart."""
        rng = generator(derive(self.seed, "control"))
        data = self.subject.dataset
        count = min(_CONTROL_ROWS, len(data.y_train) // 2 * 2)
        x = data.train_inputs(np.sort(rng.choice(len(data.y_train), count, replace=False)))
        y = rng.integers(data.classes, size=count)
        insides = inference.balanced(_CONTROL_SHADOWS + 2, count, rng)
        models = [
            self._by_heart(x, y, inside, derive(self.seed, "control", index))
            for index, inside in enumerate(insides)
        ]
        scores = attacks(
            models[0][None], np.stack(models[2:])[:, None], insides[2:], np.arange(count)
        )
        areas = {name: auc(*sides(values, insides[0])).value for name, values in scores.items()}
        return Gate(
            "positive control",
            min(areas.values()) > OVERFITTED,
            f"on a network that learnt {count // 2} random labels by heart, AUC "
            f"{_listed(areas)}; above {OVERFITTED} is needed",
        )

    def _by_heart(
        self, x: NDArray[np.float32], y: NDArray[np.int64], inside: Inside, seed: int
    ) -> Signals:
        """Return all rows' signals after training on some until they are known, or epochs end."""
        experiment = self.subject.experiment.replace(seed=seed)
        trainer = federation.trainer_of(experiment, self.subject.dataset)
        for epoch in range(0, _CONTROL_EPOCHS, _BY_HEART.local_epochs):
            trainer.train(x[inside], y[inside], _BY_HEART, derive(seed, epoch))
            if trainer.evaluate(x[inside], y[inside]).loss < _KNOWN:
                break
        return _shadows.signals(trainer, trainer.weights(), trainer.state(), x, y)

    def _negative(self) -> Gate:
        """Tell training from test rows by a model that saw none of those asked about."""
        shadow = self.shadows[0]
        areas = {
            name: auc(*sides(scores, self.pool.members, ~shadow.inside), confidence=SURE)
            for name, scores in self._of_shadow(0, "deployed").items()
        }
        values = {name: area.value for name, area in areas.items()}
        return Gate(
            "negative control",
            all(area.holds(0.5) for area in areas.values()),
            "the run's training and test rows told apart by a model that saw neither, AUC "
            f"{_listed(values)}; intervals must hold 0.5, or the halves differ by more than "
            "membership",
        )


class _Watched:
    """The run's own federation, run again with its server watched."""

    def __init__(self, subject: Subject, checkpoints: list[int], observed: list[int]) -> None:
        self.subject, self.observed = subject, observed
        pool = federation.Pool(subject.dataset, 0)
        self.x, self.y = pool.inputs, pool.labels
        self.trainer = federation.trainer_of(subject.experiment, subject.dataset)
        self.rounds = _shadows.Rounds(self.trainer, self.x, self.y, checkpoints)
        self.parts = federation.clients(subject.experiment, subject.dataset)
        self.updates = 0
        #: By attack and whether in float, each client's scores of all rows in each round.
        self._scores: dict[tuple[str, bool], dict[int, list[Signals]]] = {}
        self._strangers: list[Sides] = []

    def run(self, work: Work) -> None:
        """Run it, and note whether it gave the same model."""
        tensors = federation.federate(
            self.subject.experiment,
            self.subject.dataset,
            work.folder / "federation",
            work.workers,
            self._see,
        )
        own = self.subject.tensors
        self.same = tensors.keys() == own.keys() and all(
            np.array_equal(tensor, own[name]) for name, tensor in tensors.items()
        )

    def _see(self, seen: Seen) -> None:
        self.rounds.see(seen)
        if seen.round not in self.observed or len(seen.deltas) < _FEWEST:
            return
        self.updates += len(seen.deltas)
        clients = sorted(seen.deltas)
        for twin in (False, True):
            gains = self._gains(seen, clients, twin)
            for name, scores in (
                (COMPARED, inference.null_deviation(gains)),
                ("gain in confidence", gains),
            ):
                kept = self._scores.setdefault((name, twin), {})
                for client, values in zip(clients, scores, strict=True):
                    kept.setdefault(client, []).append(values)
            if seen.round == 1 and not twin:
                self._strangers = self._asked_of_strangers(gains, clients)

    def _gains(self, seen: Seen, clients: list[int], twin: bool) -> Signals:
        """Return how much each update adds to the confidence in each row's label, (clients, n).

        Rows that no client of the round is asked about stay zero.
        """
        rows = np.unique(np.concatenate([np.concatenate(self._asked(c)) for c in clients]))
        x, y, trainer = self.x[rows], self.y[rows], self.trainer
        before = _shadows.signals(trainer, seen.weights, seen.state, x, y, twin=twin)
        gains = np.zeros((len(clients), len(self.y)))
        for place, client in enumerate(clients):
            weights = seen.weights + seen.deltas[client]
            after = _shadows.signals(trainer, weights, seen.state, x, y, twin=twin)
            gains[place, rows] = after - before
        return gains

    def _asked(self, client: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return a client's rows, and test rows of the same classes."""
        own, first = self.parts[client], len(self.subject.dataset.y_train)
        return own, first + _alike(self.y[own], self.y[first:])

    def _asked_of_strangers(self, gains: Signals, clients: list[int]) -> list[Sides]:
        """Ask of each update about the rows of the next client, whose update is left out."""
        found = []
        for place in range(len(clients)):
            owner = (place + 1) % len(clients)
            scores = inference.null_deviation(np.delete(gains, owner, axis=0))
            found.append(self._sides(scores[place - (owner < place)], clients[owner]))
        return found

    def _sides(self, scores: Signals, client: int) -> Sides:
        """Return the scores of the rows that a client is asked about."""
        own, others = self._asked(client)
        return scores[own], scores[others]

    def judged(self, twin: bool) -> dict[str, Sides]:
        """Return the sides of every attack."""
        return {
            name: _pooled(
                self._sides(np.mean(scores, axis=0), client) for client, scores in kept.items()
            )
            for (name, in_float), kept in self._scores.items()
            if in_float == twin
        }

    @property
    def gates(self) -> tuple[Gate, ...]:
        """That the updates' negative control holds, beside :attr:`repeated`."""
        if not self._strangers:
            return (self.repeated,)
        area = auc(*_pooled(self._strangers), confidence=SURE)
        control = Gate(
            "negative control",
            area.holds(0.5),
            f"asked about rows of a client whose update is left out, AUC {area.value:.3f}; the "
            f"interval {area.low:.3f} to {area.high:.3f} must hold 0.5",
        )
        return self.repeated, control

    @property
    def repeated(self) -> Gate:
        """That the federation is the run's: the same seed gives the same model."""
        noisy = self.subject.experiment.privacy.unit is not None
        digest = str((read_summary(self.subject.path) or {}).get("model_sha256", ""))[:12]
        detail = f"the watched federation ended in the run's model {digest}"
        if not self.same:
            detail = f"the watched federation ended in another model than {digest}"
            detail += "; the noise is drawn anew" if noisy else ": another machine or release?"
        return Gate("the run repeated", self.same or noisy, detail)


def _outcomes(
    place: str,
    judged: Mapping[str, Mapping[str, Sides]],
    gates: Iterable[Gate],
    threat: str,
    budget: Mapping[str, Any],
) -> list[Outcome]:
    """Return AUC and true-positive rates of the strongest attack of several.

    Intervals hold for all attacks together, so for the strongest, too (Bonferroni).
    """
    deployed, twin = judged["deployed"], judged["twin"]
    confidence = 1 - 0.05 / len(deployed)
    tried = Gate("at least two attacks", len(deployed) > 1, ", ".join(deployed))
    areas = {name: auc(*scores, confidence) for name, scores in deployed.items()}
    best = max(areas, key=lambda name: areas[name].value)
    members, others = (len(side) for side in deployed[best])
    common: dict[str, Any] = {
        "bound": "lower",
        "threat": threat,
        "budget": {**budget, "members": members, "non-members": others},
        "gates": (*gates, tried),
    }
    outcomes = [
        Outcome(
            name=f"{place}, AUC",
            metric="AUC",
            value=areas[best].value,
            unit="AUC",
            twin=auc(*twin[best]).value,
            interval=areas[best].interval,
            details={
                "attack": best,
                "deployed": {name: area.value for name, area in areas.items()},
                "float": {name: auc(*scores).value for name, scores in twin.items()},
            },
            plot=_plot(place, deployed),
            **common,
        )
    ]
    for rate in RATES:
        found = {name: tpr_at(rate, *scores, confidence) for name, scores in deployed.items()}
        best = max(found, key=lambda name: found[name].tpr.value)
        metric = f"TPR at {100 * rate:g} % FPR"
        if not found[best].enough:
            needed = round(NEEDED / rate)
            outcomes.append(
                Outcome(
                    name=f"{place}, {metric}",
                    metric=metric,
                    status="withheld",
                    reason=f"{others} non-members; {needed} are needed for this claim",
                    **common,
                )
            )
            continue
        outcomes.append(
            Outcome(
                name=f"{place}, {metric}",
                metric=metric,
                value=found[best].tpr.value,
                twin=tpr_at(rate, *twin[best]).tpr.value,
                interval=found[best].tpr.interval,
                details={
                    "attack": best,
                    "FPR interval": list(found[best].fpr.interval),
                    "deployed": {name: one.tpr.value for name, one in found.items()},
                    "float": {
                        name: tpr_at(rate, *scores).tpr.value for name, scores in twin.items()
                    },
                },
                **common,
            )
        )
    return outcomes


def _plot(place: str, attacked: Mapping[str, Sides]) -> Plot:
    curves = [Curve(name, *roc(*scores)) for name, scores in attacked.items()]
    least = min(min(curve.x) for curve in curves)
    chance = tuple(float(x) for x in np.geomspace(least, 1, 20))
    return Plot(
        title=f"Membership, {place}",
        x_label="false-positive rate",
        y_label="true-positive rate",
        curves=(*curves, Curve("chance", chance, chance)),
        log=True,
    )


def _pooled(each: Iterable[Sides]) -> Sides:
    members, others = zip(*each, strict=True)
    return np.concatenate(members), np.concatenate(others)


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return at most ``count`` rounds from ``first`` to ``last``, evenly spread."""
    if count < 1 or first > last:
        return []
    return sorted({round(number) for number in np.linspace(first, last, count)})


def _alike(labels: NDArray[np.int64], candidates: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return places of candidates with the given labels: of each as many, as far as there are."""
    chosen = [
        np.flatnonzero(candidates == label)[:count]
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True)
    ]
    return np.concatenate(chosen)
