"""What a model is judged by: a number's name, its direction and how it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    Attributes:
      name: Its key in ``rounds.jsonl`` and ``summary.json``; the float twin's is ``float_`` before.
      title: What tables and plots call it.
      higher_is_better: Its direction.
      percent: Whether it is a share, read as a percentage.

    Example:
      >>> ACCURACY.text(0.9712), MAE.text(0.31251), AUC.text(None)
      ('97.1 %', '0.3125', '-')
      >>> ACCURACY.reached(0.9, 0.8), MAE.reached(0.9, 0.8)
      (True, False)
    """

    name: str
    title: str
    higher_is_better: bool = True
    percent: bool = False

    @property
    def float_name(self) -> str:
        """The key of the float twin's."""
        return f"float_{self.name}"

    @property
    def scale(self) -> float:
        """What a value is multiplied by where it is drawn."""
        return 100.0 if self.percent else 1.0

    def text(self, value: float | None) -> str:
        """Return a value as it is read, ``-`` if there is none."""
        if value is None:
            return "-"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"

    def loss(self, value: float) -> float:
        """Return a value whose order is from best to worst."""
        return -value if self.higher_is_better else value

    def reached(self, value: float, level: float) -> bool:
        """Whether a value is as good as a level, or better."""
        return value >= level if self.higher_is_better else value <= level

    def best(self, values: Iterable[float]) -> float:
        """Return the best of some values."""
        return max(values) if self.higher_is_better else min(values)

    def worst(self, values: Iterable[float]) -> float:
        """Return the worst of some values."""
        return min(values) if self.higher_is_better else max(values)

    def part(self, value: float, share: float) -> float:
        """Return what is worth ``share`` of a value: ``share`` times it, or it over ``share``."""
        return value * share if self.higher_is_better else value / share


ACCURACY = Metric("accuracy", "accuracy", percent=True)
AUC = Metric("auc", "AUC")
MAE = Metric("mae", "MAE", higher_is_better=False)
METRICS = (ACCURACY, AUC, MAE)


def metric_of(record: Mapping[str, Any]) -> Metric | None:
    """Return the metric that a round, a summary or a report has a value of.

    >>> metric_of({"round": 3, "auc": 0.8}).title
    'AUC'
    """
    return next((metric for metric in METRICS if record.get(metric.name) is not None), None)


def roc_auc(positive: NDArray[Any], scores: NDArray[Any]) -> float:
    """Return the area under the ROC curve: the chance that a positive outscores a negative.

    Equal scores count half: the Mann-Whitney statistic, from mean ranks. NaN if either kind is
    missing.

    Args:
      positive: (n,) truth.
      scores: (n,) larger for what is more likely positive.

    Example:
      >>> roc_auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
      0.75

    Reference:
      Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve", Radiology 143.
    """
    positive = np.asarray(positive).astype(bool)
    wins, losses = int(positive.sum()), int((~positive).sum())
    if not wins or not losses:
        return float("nan")
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1, ties in the middle
    return float((ranks[positive].sum() - wins * (wins + 1) / 2) / (wins * losses))


def recordings_auc(truths: NDArray[Any], errors: NDArray[Any]) -> float:
    """Return the mean area over machines, of recordings by the mean error of their parts.

    NaN if no machine has recordings of both kinds.

    Args:
      truths: (n, 3) per part: whether it is anomalous, its recording and its machine.
      errors: (n,) larger for what is more likely anomalous.
    """
    _, first, place = np.unique(truths[:, 1], return_index=True, return_inverse=True)
    scores = np.bincount(place, errors.astype(np.float64)) / np.bincount(place)
    anomalous, machines = truths[first, 0], truths[first, 2]
    areas = np.array(
        [roc_auc(anomalous[machines == m], scores[machines == m]) for m in np.unique(machines)]
    )
    return float(np.nanmean(areas)) if not np.isnan(areas).all() else float("nan")
