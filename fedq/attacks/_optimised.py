"""What min-max and min-sum share: the farthest point along a direction, Shejwalkar et al. 2021."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedq.attacks.base import Rows, moments

Direction = Literal["unit", "std", "sign"]
_FARTHEST = 1e6
_STEPS = 60


def perturbed(
    own: Rows, others: Rows, direction: Direction, limit: str, stretch: float = 1.0
) -> Rows:
    """Return ``mean + stretch gamma p``, gamma the largest within the limit of honest updates.

    Args:
      own: (m, d).
      others: (h, d).
      direction: p is the negative of the mean's direction, of the deviation or of the mean's sign.
      limit: ``"max"``: no farther from any honest update than two of those are from each other;
        ``"sum"``: no larger a sum of squared distances to them than any of those has.
      stretch: Times that gamma.
    """
    rows = others if len(others) else own
    mean, deviation = moments(others, own)
    if direction == "unit":
        step = -mean / max(float(np.linalg.norm(mean)), 1e-30)
    else:
        step = -deviation if direction == "std" else -np.sign(mean)
    gram = rows @ rows.T
    squares = np.diag(gram)
    between = np.maximum(squares[:, None] + squares - 2 * gram, 0)
    gaps = mean - rows
    constant = np.square(gaps).sum(axis=1)
    linear, quadratic = 2 * gaps @ step, float(step @ step)

    def distances(gamma: float) -> NDArray[np.float64]:
        return np.asarray(constant + gamma * linear + gamma**2 * quadratic)

    def within(gamma: float) -> bool:
        if limit == "max":
            return float(distances(gamma).max()) <= float(between.max())
        return float(distances(gamma).sum()) <= float(between.sum(axis=1).max())

    low, high = 0.0, _FARTHEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return np.asarray(mean + stretch * low * step)
