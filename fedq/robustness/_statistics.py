"""Shares, receiver operating characteristics and their confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import beta, rankdata
from scipy.stats import t as student

from fedq.errors import ConfigError

Scores = NDArray[np.float64]

#: Non-members that a claim at a false-positive rate needs, in units of one over the rate.
NEEDED = 10
_POINTS = 200


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def holds(self, value: float) -> bool:
        """Whether a value lies in the interval."""
        return self.low <= value <= self.high


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """Return a share with its exact interval: it covers the truth at least so often.

    Args:
      successes: From 0 to ``trials``.
      trials: Independent, at least 1.
      confidence: Of the interval, both sides together.

    Example:
      >>> share = clopper_pearson(0, 1000)
      >>> share.value, round(share.high, 5)
      (0.0, 0.00368)

    Reference:
      Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of
      the binomial", Biometrika 26.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ConfigError(f"need 0 to n successes of n > 0 trials, not {successes} of {trials}")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = 1.0
    if successes < trials:
        high = float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return Estimate(successes / trials, low, high)


def mean(values: NDArray[Any], confidence: float = 0.95) -> Estimate:
    """Return a mean with Student's interval; that of one value has no ends."""
    found = float(np.mean(values))
    if len(values) < 2:
        return Estimate(found, -math.inf, math.inf)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(student.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Estimate(found, found - reach, found + reach)


def auc(members: NDArray[Any], others: NDArray[Any], confidence: float = 0.95) -> Estimate:
    """Return the area under the ROC: the chance that a member scores above another; ties count 1/2.

    The interval is DeLong's. Where all scores are apart its variance vanishes; there, and whenever
    it is larger, the interval ends where the smaller sample could still hide one exception: at
    the Clopper-Pearson bound of none in it.

    Example:
      >>> area = auc(np.array([2.0, 3.0, 4.0]), np.array([0.0, 1.0, 2.0]))
      >>> round(area.value, 3)
      0.944

    Reference:
      DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44; the computation by ranks is of Sun and
      Xu 2014, IEEE Signal Processing Letters 21.
    """
    m, n = len(members), len(others)
    if min(m, n) < 2:
        raise ConfigError(f"an AUC needs two scores on either side, not {m} and {n}")
    ranks = rankdata(np.concatenate([members, others]))
    above = (ranks[:m] - rankdata(members)) / n  # of each member: share of others below it
    below = 1 - (ranks[m:] - rankdata(others)) / m
    area = float(above.mean())
    deviation = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    reach = float(ndtri((1 + confidence) / 2)) * deviation
    hidden = clopper_pearson(0, min(m, n), confidence).high
    low, high = area - reach, area + reach
    if area in (0.0, 1.0):
        low, high = area - hidden, area + hidden
    return Estimate(area, max(low, 0.0), min(high, 1.0))


@dataclass(frozen=True)
class Detection:
    """How many members are found at a false-positive rate.

    Attributes:
      tpr: Share of members above the threshold, with its exact interval.
      fpr: Share of others above it, likewise: how well the sample fixes the rate.
      enough: Whether there are at least ``NEEDED / rate`` others.
    """

    tpr: Estimate
    fpr: Estimate
    enough: bool


def tpr_at(
    rate: float, members: NDArray[Any], others: NDArray[Any], confidence: float = 0.95
) -> Detection:
    """Return the share of members above the lowest threshold that keeps to a false-positive rate.

    Example:
      >>> scores = np.arange(1000.0)
      >>> found = tpr_at(0.01, scores + 500, scores)
      >>> found.tpr.value, found.fpr.value, found.enough
      (0.51, 0.01, True)
    """
    n = len(others)
    threshold = np.sort(others)[::-1][min(int(rate * n + 1e-9), n - 1)]
    return Detection(
        clopper_pearson(int((members > threshold).sum()), len(members), confidence),
        clopper_pearson(int((others > threshold).sum()), n, confidence),
        n * rate >= NEEDED - 1e-9,
    )


def roc(members: NDArray[Any], others: NDArray[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return false and true positive rates for logarithmic axes: positive, few, increasing."""
    thresholds = np.sort(others)[::-1]
    n = len(thresholds)
    allowed = np.unique(np.geomspace(1, n, _POINTS).astype(int)) - 1
    found = [float((members > thresholds[k]).mean()) for k in allowed]
    rates = [float(max(k, 1) / n) for k in allowed]
    points = dict(zip(rates, found, strict=True))
    points[1.0] = 1.0
    shown = [(x, y) for x, y in points.items() if y > 0]
    return tuple(x for x, _ in shown), tuple(y for _, y in shown)
