"""What evaluations of training under attack share: attacks and rules by name, cells, gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedq import registry
from fedq.aggregators.base import Aggregator
from fedq.attacks.base import Attack
from fedq.errors import ConfigError, FedqError
from fedq.registry import describe
from fedq.robustness import _continued
from fedq.robustness.base import Work
from fedq.robustness.outcome import Gate, Outcome
from fedq.robustness.subject import Subject

ADAPTIVE = "adaptive:"
NO_ATTACK = "none"
#: Clients of which a fifth can be hostile at all.
FEWEST = 5
_SKEWED = 0.1
THREAT = (
    "colluding clients that know all updates, the codec, the guard and the rule, and send what "
    "they like in every round"
)
Summary = Mapping[str, Any]
#: Of each attack.
Cells = Mapping[str, Summary]


def attack_of(name: str, fraction: float) -> Attack:
    """Return an attack by name; ``adaptive:NAME`` is that one tuned to the server.

    >>> attack_of("adaptive:ipm", 0.2).inner.name
    'ipm'
    """
    options: dict[str, Any] = {"fraction": fraction}
    if name.startswith(ADAPTIVE):
        options["inner"] = name.removeprefix(ADAPTIVE)
        name = "adaptive"
    attack: Attack = registry.build("attack", name, **options)
    return attack


def rule_of(name: str, hostile: int, clients: int) -> Aggregator:
    """Return a rule by name, made for so many hostile clients in the cohort.

    >>> rule_of("trimmed_mean", 2, 10).trim * 10 // 1
    2.0
    """
    known = registry.fields(registry.lookup("aggregator", name))
    options: dict[str, Any] = {}
    if "f" in known:
        options["f"] = hostile
    if "trim" in known:
        options["trim"] = (hostile + 0.5) / clients  # its floor of the cohort is the count
    if "inner" in known:
        options["inner"] = rule_of("trimmed_mean", hostile, clients)
    rule: Aggregator = registry.build("aggregator", name, **options)
    return rule


def declared(rule: Any, clients: int) -> int:
    """Return how many hostile clients a rule is made for, by its options; 0 if they do not say."""
    f = getattr(rule, "f", getattr(rule, "trim", 0))
    return f if isinstance(f, int) else math.floor(f * clients)


@dataclass(frozen=True)
class Setting:
    """Clients and rounds of the federations of an evaluation.

    Attributes:
      subject: The run that they go on from.
      work: How.
      parts: Training rows of each client.
      rounds: After the run's last.
      fraction: Of clients that are hostile.
    """

    subject: Subject
    work: Work
    parts: _continued.Parts
    rounds: int
    fraction: float

    @classmethod
    def of(
        cls, subject: Subject, work: Work, clients: int, rounds: int, fraction: float
    ) -> Setting:
        """Return the setting with the first clients of the run that have data."""
        return cls(subject, work, _filled(subject)[:clients], rounds, fraction)

    @property
    def hostile(self) -> int:
        """Hostile clients, all of them in every round."""
        return round(self.fraction * len(self.parts))

    def rules(self, names: Sequence[str]) -> dict[str, Aggregator]:
        """Return the run's own rule, and those named, by what they are called."""
        own: Aggregator = self.subject.experiment.aggregator
        rules = [own, *(rule_of(name, self.hostile, len(self.parts)) for name in names)]
        return {describe(rule): rule for rule in rules}

    def cells(
        self, attacks: Sequence[str], rules: Mapping[str, Aggregator]
    ) -> dict[str, Cells | FedqError]:
        """Return by rule the federations without an attack and with each, or why there are none."""
        tried = (NO_ATTACK, *attacks)
        done = 0
        cells: dict[str, Cells | FedqError] = {}
        for label, rule in rules.items():
            found: dict[str, Summary] = {}
            try:
                rule.check(len(self.parts))
                for name in tried:
                    self.work.step(done + len(found), len(rules) * len(tried))
                    found[name] = self.cell(name, rule)
                cells[label] = found
            except FedqError as error:
                cells[label] = error
            done += len(tried)
        self.work.step(done, done)
        return cells

    def cell(self, attack: str, rule: Aggregator) -> Summary:
        """Return the federation under one attack, or :data:`NO_ATTACK`, and one rule."""
        honest = attack == NO_ATTACK
        chosen = registry.build("attack", attack) if honest else attack_of(attack, self.fraction)
        summary = _continued.go_on(
            self.subject,
            self.work,
            self.rounds,
            self.parts,
            attack=chosen,
            aggregator=rule,
            uplink_context=False,
            sealed=False,
        )
        if summary["rejected"].get("aggregator"):
            # A model that stands still looks robust.
            raise FedqError(f"{describe(rule)} skipped rounds: too few updates were left for it")
        return summary

    def gates(self, rule: Aggregator) -> tuple[Gate, ...]:
        """Return whether as many are hostile as the rule is made for, and data differ."""
        made_for, clients = declared(rule, len(self.parts)), len(self.parts)
        dataset = self.subject.dataset
        found = _continued.skew(self.parts, dataset.y_train, dataset.classes)
        return (
            Gate(
                "as many hostile as declared",
                self.hostile >= max(1, made_for),
                f"{self.hostile} of {clients} clients are hostile, the rule is made for {made_for}",
            ),
            Gate(
                "clients of unlike data",
                found >= _SKEWED,
                f"mean total variation of clients' labels from all labels is {found:.2f}",
            ),
        )

    @property
    def budget(self) -> dict[str, Any]:
        """What was spent, for a card."""
        return {"clients": len(self.parts), "hostile": self.hostile, "rounds": self.rounds}


def check(clients: int, rounds: int, fraction: float, attacks: Sequence[str]) -> None:
    """Check the options of an evaluation; a misspelt attack is named at once."""
    if clients < FEWEST:
        raise ConfigError(f"evaluation.clients must be at least {FEWEST}, not {clients}")
    if rounds < 1:
        raise ConfigError(f"evaluation.rounds must be at least 1, not {rounds}")
    if not 0 < fraction < 0.5:
        raise ConfigError(f"evaluation.fraction must lie in (0, 0.5), not {fraction}")
    if not attacks:
        raise ConfigError("evaluation.attacks must name at least one")
    for name in attacks:
        attack_of(name, fraction)


def unsuitable(subject: Subject) -> str:
    """Return why no federation under attack can go on from a run; empty if one can."""
    experiment, clients = subject.experiment, len(_filled(subject))
    if experiment.secure_aggregation.integers or experiment.privacy.integers:
        return "clients send masked or noised integers, which attacks on payloads do not rewrite"
    if clients < FEWEST:
        return f"{clients} clients have data; an attack by a minority needs {FEWEST}"
    return ""


def tuned_gate(
    attacks: Sequence[str], harm: Callable[[str], float], slack: float, unit: str
) -> Gate:
    """Return whether tuning made attacks no weaker.

    Args:
      attacks: Names; of each ``adaptive:NAME`` the plain one, too, where it is among them.
      harm: What an attack achieved; more is worse.
      slack: What tuning may lose, of noise.
      unit: Of the harm, for the text.
    """
    name = "attack tuned to the rule"
    tuned = [attack for attack in attacks if attack.startswith(ADAPTIVE)]
    if not tuned:
        return Gate(name, False, "no attack was tuned to the rule")
    worst = max(map(harm, tuned))
    plain = [harm(a.removeprefix(ADAPTIVE)) for a in tuned if a.removeprefix(ADAPTIVE) in attacks]
    told = f"tuned attacks reach {worst:.3f} {unit}"
    if not plain:
        return Gate(name, True, told)
    return Gate(name, worst >= max(plain) - slack, f"{told}, the same untuned {max(plain):.3f}")


def failed(rule: str, metric: str, error: FedqError) -> Outcome:
    """Return the outcome of a rule under which a federation could not go on."""
    return Outcome(name=rule, metric=metric, status="skipped", reason=str(error))


def noise(examples: int) -> float:
    """Return three standard errors of a share of so many examples, at worst."""
    return 3 * float(np.sqrt(0.25 / examples))


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """Return shares rounded for a card."""
    return {name: round(value, 4) for name, value in values.items()}


def _filled(subject: Subject) -> list[Any]:
    return [part for part in subject.parts if len(part)]
