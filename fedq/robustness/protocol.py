"""Payloads and protocol: hostile bytes and lies against the real decoders, guard and parties."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedq.errors import ConfigError, FedqError
from fedq.random import derive, generator
from fedq.registry import build, register, to_config
from fedq.robustness import _hostile, _liars, _rules
from fedq.robustness.base import Evaluation, Work
from fedq.robustness.outcome import Gate, Outcome
from fedq.robustness.subject import Subject
from fedq.training import trainer_for

#: Refused in every round in which they are sent, by whatever codec.
_REFUSED = ("wrong_seed", "replay")
_ROUNDS, _CLIENTS = 2, 6
_BATCH = 50
_METRIC = "hostile messages that were accepted"


@register("evaluation", "protocol")
class Protocol(Evaluation):
    """Whether what must be refused is refused, by name, by the parties that a fleet runs.

    Mutated payloads at the decoders of all codecs and, at its own size, of the run's, with its
    guard behind them; attacks on payloads in a federation that goes on from the run; lies about
    sealed updates, signed requests and secure sums. One that is accepted fails the card.

    Args:
      payloads: Mutated payloads in all.
      attacks: On payloads, in a federation of a few clients.
    """

    family = "protocol"

    payloads: int = 3000
    attacks: tuple[str, ...] = ("wrong_seed", "replay", "bad_scale", "off_grid", "bomb")

    def __post_init__(self) -> None:
        if self.payloads < 1:
            raise ConfigError(f"evaluation.payloads must be at least 1, not {self.payloads}")
        for name in self.attacks:
            _rules.attack_of(name, 0.2)

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Return what was accepted of each kind, and how much was tried."""
        tasks = 10 + len(self.attacks)
        outcomes = [self._fuzzed(subject, work, tasks)]
        for name, lies, honest in (
            ("sealed updates", _liars.envelopes, _liars.honest_envelope),
            ("signed requests, downgrades", _liars.downgrades, _liars.honest_request),
            ("secure sums, a lying server", _liars.secure_sums, _liars.honest_sum),
        ):
            outcomes.append(_told(name, lies(), honest))
        work.step(10, tasks)
        if self.attacks and not _rules.unsuitable(subject):
            outcomes.append(self._sent(subject, work, tasks))
        return outcomes

    def _fuzzed(self, subject: Subject, work: Work, tasks: int) -> Outcome:
        rng = generator(derive(work.seed, "payloads"))
        guard = subject.experiment.guard
        small = _hostile.targets(rng)
        own = _own_target(subject, rng)
        kinds: Counter[str] = Counter()
        accepted: list[str] = []
        for sent in range(self.payloads):
            # One in twenty at the run's own size, which is slower by far.
            target = own if sent % 20 == 19 else small[int(rng.integers(len(small)))]
            verdict = target.judged(target.hostile(rng), guard)
            if verdict not in ("refused", "harmless"):
                accepted.append(verdict)
                verdict = "accepted"
            kinds[verdict] += 1
            if sent % _BATCH == 0:
                work.step(10 * sent // self.payloads, tasks)
        return _outcome(
            "hostile payloads",
            accepted,
            self.payloads,
            (_honest_passes([*small, own], guard), _careless_is_caught(small[0], guard)),
            {
                "refused": kinds["refused"],
                "finite and within the guard's limits": kinds["harmless"],
            },
        )

    def _sent(self, subject: Subject, work: Work, tasks: int) -> Outcome:
        setting = _rules.Setting.of(subject, work, _CLIENTS, _ROUNDS, 0.34)
        accepted, details = [], {}
        for number, name in enumerate(self.attacks):
            try:
                summary = setting.cell(name, build("aggregator", "mean"))
            except FedqError as error:
                accepted.append(f"{name}: {error}")
                continue
            rejected = sum(summary["rejected"].values())
            details[name] = {"sent": summary["attackers"], **summary["rejected"]}
            # The first reply of a replay is its sender's own.
            must = summary["attackers"] - (setting.hostile if name == "replay" else 0)
            if name in _REFUSED and rejected < must:
                accepted.append(f"{name}: {must - rejected} of {must}")
            elif not np.isfinite(summary["loss"] or np.nan):
                accepted.append(f"{name}: the model is not finite")
            work.step(11 + number, tasks)
        sent = sum(int(row["sent"]) for row in details.values())
        gate = Gate("hostile clients took part", sent > 0, f"{sent} messages were hostile")
        return _outcome("attacks on payloads in a federation", accepted, sent, (gate,), details)


def _own_target(subject: Subject, rng: np.random.Generator) -> _hostile.Target:
    """Return the decoder of the run's own codec and size."""
    experiment, dataset = subject.experiment, subject.dataset
    trainer = trainer_for(
        to_config(experiment.model),
        to_config(experiment.quantization),
        list(dataset.input_shape),
        dataset.classes,
    )
    return _hostile.Target.of(experiment.codec, trainer.layout, rng)


def _told(name: str, lies: dict[str, _liars.Lie], honest: Callable[[], None]) -> Outcome:
    try:
        honest()
        gate = Gate("the honest way works", True, "an honest message of this kind is accepted")
    except FedqError as error:
        gate = Gate("the honest way works", False, f"an honest message is refused: {error}")
    return _outcome(name, _liars.believed(lies), len(lies), (gate,), {"lies": sorted(lies)[:40]})


def _honest_passes(targets: Sequence[_hostile.Target], guard: Any) -> Gate:
    refused = [t.name for t in targets if t.judged(t.payload, guard) != "harmless"]
    told = f"honest payloads are refused of {', '.join(refused)}" if refused else "all are accepted"
    return Gate("honest payloads pass", not refused, told)


def _careless_is_caught(target: _hostile.Target, guard: Any) -> Gate:
    """Whether a decoder without checks would be noticed."""
    verdicts = [
        dataclasses.replace(target, decode=decode).judged(b"", guard)
        for decode in (
            lambda data: np.full(target.layout.size, np.nan, np.float32),
            lambda data: np.zeros(3, np.float32),
            lambda data: np.ones(1)[9],
        )
    ]
    missed = [verdict for verdict in verdicts if verdict in ("refused", "harmless")]
    return Gate(
        "decoders without checks are noticed", not missed, f"{len(missed)} of 3 were missed"
    )


def _outcome(
    name: str, accepted: list[str], sent: int, gates: tuple[Gate, ...], details: dict[str, Any]
) -> Outcome:
    some = "; ".join(sorted(set(accepted))[:5])
    return Outcome(
        name=name,
        metric=_METRIC,
        value=float(len(accepted)),
        unit="count",
        bound="lower",
        status="failed" if accepted else "measured",
        reason=f"{len(accepted)} of {sent} were accepted: {some}" if accepted else "",
        threat="a client, a server or a network that sends any bytes it likes, at any time",
        budget={"messages": sent},
        gates=gates,
        details=details,
    )
