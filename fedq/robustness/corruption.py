"""Common corruptions and sensor faults (Hendrycks & Dietterich 2019, ICLR, arXiv:1903.12261)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.random import derive, generator
from fedq.registry import register
from fedq.robustness._corruptions import CORRUPTIONS, SEVERITIES, Corruption
from fedq.robustness.base import Evaluation, Family, Work
from fedq.robustness.outcome import Curve, Gate, Outcome, Plot
from fedq.robustness.subject import Subject

Floats = NDArray[np.float32]


@register("evaluation", "corruption")
class CorruptionEvaluation(Evaluation):
    """Accuracy when nobody attacks, but inputs go wrong: five severities of each corruption.

    The mean corruption error (mCE) compares with the float twin: for each corruption, the errors of
    the deployed model over all severities, plus one, by those of the twin, plus one; then the mean
    over corruptions. 1 is as robust as the twin.

    Args:
      test_examples: At least 20; all if there are fewer.
    """

    family: ClassVar[Family] = "corruption"
    test_examples: int = 500

    def __post_init__(self) -> None:
        if self.test_examples < 20:
            raise ConfigError(
                f"corruption.test_examples must be at least 20, not {self.test_examples}"
            )

    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Return the mCE, and the mean accuracy under each category of corruptions."""
        x, y = subject.sample(self.test_examples, derive(work.seed, "examples"))
        kind = subject.dataset.kind
        corruptions = [c for c in CORRUPTIONS if c.kind == kind]
        low, high = (0.0, 1.0) if kind != "image" else (float(x.min()), float(x.max()))
        span = max(high - low, 1e-12)
        right = np.zeros((2, len(corruptions), len(SEVERITIES)), int)
        moved = np.zeros((len(corruptions), len(SEVERITIES)))
        for i, corruption in enumerate(corruptions):
            for j, severity in enumerate(SEVERITIES):
                rng = generator(derive(work.seed, corruption.name, severity))
                plain = (x.astype(np.float64) - low) / span
                changed = subject.on_grid(corruption(plain, severity, rng) * span + low)
                moved[i, j] = np.abs(changed - x).mean()
                for model, logits in enumerate((subject.deployed, subject.twin_logits)):
                    right[model, i, j] = int((logits(changed).argmax(1) == y).sum())
            work.step(i + 1, len(corruptions))
        return [
            self._mean_error(right, len(y), corruptions, moved),
            *self._categories(right / len(y), len(y), corruptions),
        ]

    def _mean_error(
        self,
        right: NDArray[np.int64],
        n: int,
        corruptions: Sequence[Corruption],
        moved: NDArray[np.float64],
    ) -> Outcome:
        errors = (n - right).sum(2)
        ratio = (errors[0] + 1) / (errors[1] + 1)
        still = [c.name for c, of in zip(corruptions, moved, strict=True) if not of.all()]
        accuracy = right / n
        return Outcome(
            name="all corruptions",
            metric="mCE: errors of the deployed model by those of its float twin",
            value=float(ratio.mean()),
            unit="x",
            twin=1.0,
            threat="Nobody attacks: cameras, weather, codecs and sensors do.",
            budget={"examples": n, "corruptions": len(corruptions), "severities": len(SEVERITIES)},
            gates=(
                Gate(
                    "every corruption changes the inputs",
                    not still,
                    f"unchanged by {', '.join(still)}" if still else "at every severity",
                ),
            ),
            details={
                "accuracy": [
                    {"corruption": c.name, "category": c.category}
                    | {
                        f"severity {s}": round(float(v), 4)
                        for s, v in zip(SEVERITIES, own, strict=True)
                    }
                    | {"mean": round(float(own.mean()), 4), "twin": round(float(twin.mean()), 4)}
                    for c, own, twin in zip(corruptions, *accuracy, strict=True)
                ]
            },
            plot=_plot(accuracy, corruptions),
        )

    def _categories(
        self, accuracy: NDArray[np.float64], n: int, corruptions: Sequence[Corruption]
    ) -> list[Outcome]:
        outcomes = []
        for category in dict.fromkeys(c.category for c in corruptions):
            rows = [i for i, c in enumerate(corruptions) if c.category == category]
            names = ", ".join(corruptions[i].name for i in rows)
            own, twin = accuracy[:, rows].mean((1, 2))
            worst = min(rows, key=lambda i: accuracy[0, i, -1])
            outcomes.append(
                Outcome(
                    name=category,
                    metric="mean accuracy over severities",
                    value=float(own),
                    twin=float(twin),
                    threat=f"{names}; severities 1 to 5.",
                    budget={"examples": n},
                    details={
                        "hardest": f"{corruptions[worst].name}, severity {SEVERITIES[-1]}",
                        "accuracy there": float(accuracy[0, worst, -1]),
                    },
                )
            )
        return sorted(outcomes, key=lambda outcome: outcome.value or 0.0)


def _plot(accuracy: NDArray[np.float64], corruptions: Sequence[Corruption]) -> Plot:
    curves: list[Any] = []
    severities = tuple(map(float, SEVERITIES))
    for category in dict.fromkeys(c.category for c in corruptions):
        rows = [i for i, c in enumerate(corruptions) if c.category == category]
        curves.append(Curve(category, severities, tuple(100 * accuracy[0, rows].mean(0))))
    twin = tuple(100 * accuracy[1].mean(0))
    curves.append(Curve("float twin, all", severities, twin, dashed=True))
    return Plot("Accuracy by severity", "severity", "accuracy, %", tuple(curves))
