"""An empirical lower bound on epsilon from one run with many canaries, Steinke et al. 2023."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError


def one_run_epsilon(
    included: NDArray[np.bool_],
    scores: NDArray[Any],
    guesses: int,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Return an epsilon that the audited run exceeds at the given confidence, or 0.

    Of m canaries each takes part by the toss of a fair coin. The auditor sees what the run releases
    and scores each canary; the ``guesses / 2`` highest it guesses in, as many lowest out, and of
    the others it says nothing. Under (epsilon, delta)-privacy for adding or removing a canary, the
    number of right guesses is hardly more than Binomial(guesses, 1 / (1 + exp(-epsilon))), however
    the canaries' scores hang together. A bound above the epsilon that was claimed refutes it; one
    below proves nothing.

    Args:
      included: (m,) whose coin said in.
      scores: (m,) high for those that seem to be in.
      guesses: Even, at most m; chosen before the scores are seen.
      delta: Of the claim.
      confidence: Probability that a run which keeps its claim is not refuted.

    Example:
      >>> coins = np.arange(1000) % 2 == 0
      >>> round(one_run_epsilon(coins, coins, 1000, 1e-5), 2)  # everything was seen
      5.78

    Reference:
      Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", theorem 5.2.
    """
    m = len(included)
    if scores.shape != (m,) or guesses % 2 or not 2 <= guesses <= m:
        raise ConfigError(f"need one score for each of {m} canaries and an even number of guesses")
    order = np.argsort(scores, kind="stable")
    right = int((~included[order[: guesses // 2]]).sum() + included[order[-guesses // 2 :]].sum())

    def refuted(epsilon: float) -> bool:
        return _chance(m, guesses, right, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _chance(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the greatest probability of so many right guesses under (epsilon, delta)-privacy."""
    from scipy.stats import binom

    q = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, q))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, q))
    slope = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, tail + 2 * m * delta * slope)
