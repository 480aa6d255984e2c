"""Backdoors in training: a trigger that hostile clients teach, by aggregation rule."""

from __future__ import annotations

from collections.abc import Sequence

from fedq.errors import ConfigError, FedqError
from fedq.registry import register
from fedq.robustness import _rules
from fedq.robustness.base import Evaluation, Work
from fedq.robustness.outcome import Gate, Outcome
from fedq.robustness.subject import Subject

_WORKS, _HARMLESS = 0.5, 0.2
_METRIC = "success of the worst backdoor"


@register("evaluation", "backdoor")
class Backdoor(Evaluation):
    """Share of triggered test inputs that the deployed model takes for the attacker's class.

    As ``poisoning``, with attacks that teach a trigger. A rule is only said to stand where the same
    attack works under a plain mean.

    Args:
      attacks: Registered backdoors; ``adaptive:NAME`` is one whose boost is tuned to the rule.
      aggregators: Beside the run's own, made for as many as are hostile.
      clients: That take part.
      rounds: After the run's last.
      fraction: Of clients that are hostile.

    Reference:
      Bagdasaryan et al. 2020, "How to backdoor federated learning"; Wang et al. 2020, "Attack of
      the tails".
    """

    family = "backdoor"

    attacks: tuple[str, ...] = (
        "model_replacement",
        "adaptive:model_replacement",
        "distributed_trigger",
        "edge_case",
    )
    aggregators: tuple[str, ...] = ("mean", "multi_krum")
    clients: int = 10
    rounds: int = 4
    fraction: float = 0.2

    def __post_init__(self) -> None:
        _rules.check(self.clients, self.rounds, self.fraction, self.attacks)
        for name in self.aggregators:
            _rules.rule_of(name, 1, _rules.FEWEST)

    def unsuitable(self, subject: Subject) -> str:
        """Return why no federation under attack can go on from the run, or has no trigger."""
        if reason := _rules.unsuitable(subject):
            return reason
        try:
            for name in self.attacks:
                self._before(subject, name)
        except ConfigError as error:
            return str(error)
        return ""

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Return one outcome per rule; the run's own comes first."""
        setting = _rules.Setting.of(subject, work, self.clients, self.rounds, self.fraction)
        rules = setting.rules(self.aggregators)
        cells = setting.cells(self.attacks, rules)
        before = {name: self._before(subject, name) for name in self.attacks}
        control = self._control(cells.get("mean"))
        outcomes = []
        for label, rule in rules.items():
            found = cells[label]
            if isinstance(found, FedqError):
                outcomes.append(_rules.failed(label, _METRIC, found))
                continue
            success = {name: float(found[name]["attack_success"]) for name in self.attacks}
            worst = max(success, key=lambda name: success[name])
            quiet = Gate(
                "no success without an attack",
                before[worst] <= _HARMLESS,
                f"before the attack {before[worst]:.0%} of such inputs are taken for the class",
            )
            tuned = _rules.tuned_gate(
                self.attacks,
                lambda name, reached=success: reached[name],  # type: ignore[misc]
                _rules.noise(len(subject.dataset.y_test)),
                "success",
            )
            accuracy = {name: float(cell["accuracy"]) for name, cell in found.items()}
            outcomes.append(
                Outcome(
                    name=label,
                    metric=_METRIC,
                    value=success[worst],
                    twin=float(found[worst]["float_attack_success"]),
                    bound="lower",
                    threat=_rules.THREAT,
                    budget=setting.budget,
                    gates=(control, quiet, tuned, *setting.gates(rule)),
                    details={
                        "worst attack": worst,
                        "by attack": _rules.shares(success),
                        "before the attack": _rules.shares(before),
                        "accuracy": _rules.shares(accuracy),
                    },
                )
            )
        return outcomes

    def _before(self, subject: Subject, name: str) -> float:
        """Return the share that the run's own model takes for the attacker's class."""
        dataset = subject.dataset
        probe = _rules.attack_of(name, self.fraction).probe(
            dataset.test_inputs(), dataset.y_test, dataset.classes, dataset.high
        )
        if probe is None:
            raise ConfigError(f"attack={name} is no backdoor; see evaluation=poisoning")
        return subject.accuracy(*probe)

    def _control(self, cells: _rules.Cells | FedqError | None) -> Gate:
        name = "the attack works under a plain mean"
        if cells is None or isinstance(cells, FedqError):
            return Gate(name, False, "the plain mean was not tried")
        best = max(float(cells[attack]["attack_success"]) for attack in self.attacks)
        return Gate(name, best >= _WORKS, f"success under the mean is {best:.0%}")
