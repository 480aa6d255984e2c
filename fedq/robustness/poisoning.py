"""Poisoning: the run goes on with hostile clients, under its own rule and under others."""

from __future__ import annotations

from collections.abc import Sequence

from fedq.errors import FedqError
from fedq.registry import register
from fedq.robustness import _rules
from fedq.robustness.base import Evaluation, Work
from fedq.robustness.outcome import Outcome
from fedq.robustness.subject import Subject

_METRIC = "accuracy under the worst attack"


@register("evaluation", "poisoning")
class Poisoning(Evaluation):
    """Accuracy of the deployed model after rounds with hostile clients, by aggregation rule.

    The run goes on from its last checkpoint with its own data, codec and guard; the first
    ``clients`` of its clients take part, all in every round. Each rule is judged by its worst
    attack, and beside that by what it costs when nobody attacks.

    Args:
      attacks: Registered attacks; ``adaptive:NAME`` is one tuned to the rule in every round.
      aggregators: Beside the run's own, made for as many as are hostile.
      clients: That take part.
      rounds: After the run's last.
      fraction: Of clients that are hostile.

    Reference:
      Shejwalkar et al. 2022, "Back to the drawing board: a critical evaluation of poisoning attacks
      on production federated learning" (why the cost, the bound and unlike data belong to it).
    """

    family = "poisoning"

    attacks: tuple[str, ...] = ("sign_flip", "alie", "adaptive:alie", "label_flip")
    aggregators: tuple[str, ...] = ("mean", "median", "multi_krum")
    clients: int = 10
    rounds: int = 2
    fraction: float = 0.2

    def __post_init__(self) -> None:
        _rules.check(self.clients, self.rounds, self.fraction, self.attacks)
        for name in self.aggregators:
            _rules.rule_of(name, 1, _rules.FEWEST)

    def unsuitable(self, subject: Subject) -> str:
        """Return why no federation under attack can go on from the run."""
        return _rules.unsuitable(subject)

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Return one outcome per rule; the run's own comes first."""
        setting = _rules.Setting.of(subject, work, self.clients, self.rounds, self.fraction)
        rules = setting.rules(self.aggregators)
        cells = setting.cells(self.attacks, rules)
        mean = cells.get("mean")
        outcomes = []
        for label, rule in rules.items():
            found = cells[label]
            if isinstance(found, FedqError):
                outcomes.append(_rules.failed(label, _METRIC, found))
                continue
            accuracy = {name: float(cell["accuracy"]) for name, cell in found.items()}
            honest = accuracy.pop(_rules.NO_ATTACK)
            worst = min(accuracy, key=lambda name: accuracy[name])
            details = {
                "worst attack": worst,
                "without attack": round(honest, 4),
                "loss": round(honest - accuracy[worst], 4),
                "by attack": _rules.shares(accuracy),
                "rejected": {name: found[name]["rejected"] for name in self.attacks},
            }
            if mean is not None and not isinstance(mean, FedqError):
                cost = mean[_rules.NO_ATTACK]["accuracy"] - honest
                details["cost of the rule"] = round(cost, 4)
            tuned = _rules.tuned_gate(
                self.attacks,
                lambda name, lost=accuracy: 1 - lost[name],  # type: ignore[misc]
                _rules.noise(len(subject.dataset.y_test)),
                "of errors",
            )
            outcomes.append(
                Outcome(
                    name=label,
                    metric=_METRIC,
                    value=accuracy[worst],
                    twin=float(found[worst]["float_accuracy"]),
                    bound="upper",
                    threat=_rules.THREAT,
                    budget=setting.budget,
                    gates=(tuned, *setting.gates(rule)),
                    details=details,
                )
            )
        return outcomes
