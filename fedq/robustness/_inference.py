"""Membership scores from the outputs of a target and of shadow models: plain arrays.

The signal of an example is its logit-scaled confidence ``phi = log(p_y / (1 - p_y))``, which is
nearly normal over models (Carlini et al. 2022, section IV-C). A higher score says member.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_ndtr, logsumexp

from fedq.errors import ConfigError

Signals = NDArray[np.float64]
Inside = NDArray[np.bool_]

#: Confidence beyond which float32 logits say no more.
MOST = 30.0
#: Shadow models on either side of an example from which its own variance is fitted; with fewer, all
#: examples share one (Carlini et al. 2022, section VI-C).
OWN_VARIANCE = 32
_SMALLEST = 1e-3


def confidence(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Signals:
    """Return the logit-scaled confidence in the labels, (n,) in +-30.

    Args:
      logits: (n, classes).
      labels: (n,).

    Example:
      >>> confidence(np.array([[1.0, 0.0]], np.float32), np.array([0])).tolist()
      [1.0]
    """
    wide = logits.astype(np.float64)
    rows = np.arange(len(labels))
    own = wide[rows, labels]
    wide[rows, labels] = -np.inf
    signals: Signals = np.clip(own - logsumexp(wide, axis=1), -MOST, MOST)
    return signals


def balanced(shadows: int, examples: int, rng: np.random.Generator) -> Inside:
    """Return who trains on what, (shadows, examples): each example is in half of the shadows.

    Shadows come in pairs that share all examples out between them.
    """
    if shadows < 2 or shadows % 2:
        raise ConfigError(f"shadow models come in pairs; shadows must be even, not {shadows}")
    halves = []
    for _ in range(shadows // 2):
        half = np.zeros(examples, bool)
        half[rng.permutation(examples)[: examples // 2]] = True
        halves += [half, ~half]
    return np.stack(halves)


def lira(target: Signals, shadows: Signals, inside: Inside, *, online: bool = True) -> Signals:
    """Return the likelihood-ratio scores of examples, (n,); NaN where shadows lack a side.

    Online: ``log N(phi; in) - log N(phi; out)``. Offline: ``log P(N(out) < phi)``, from shadows
    that never saw the example.

    Args:
      target: (n,) signals of the model that is attacked.
      shadows: (s, n) signals of the shadow models.
      inside: (s, n) whether the shadow trained on the example.
      online: Use the shadows that did train on it.

    Reference:
      Carlini et al. 2022, "Membership inference attacks from first principles", algorithms 1 and 2.
    """
    out_mean, out_deviation = _fit(shadows, ~inside)
    outside = (target - out_mean) / out_deviation
    if not online:
        return np.where(np.isnan(outside), np.nan, log_ndtr(outside))
    in_mean, in_deviation = _fit(shadows, inside)
    within = (target - in_mean) / in_deviation
    return 0.5 * (outside**2 - within**2) + np.log(out_deviation / in_deviation)


def _fit(shadows: Signals, chosen: Inside) -> tuple[Signals, Signals]:
    """Return mean and deviation of what one more of the chosen shadows would say of each example.

    The mean of k models is itself uncertain: the variance is ``1 + 1 / k`` times theirs.
    """
    count = chosen.sum(axis=0)
    some = np.maximum(count, 1)
    mean = np.where(count > 0, np.where(chosen, shadows, 0.0).sum(axis=0) / some, np.nan)
    squares = np.where(chosen, (shadows - mean) ** 2, 0.0).sum(axis=0)
    if count.min() >= OWN_VARIANCE:
        variance = squares / (count - 1)
    else:
        freedom = np.maximum(count - 1, 0).sum()
        variance = np.full(len(mean), squares[count > 1].sum() / freedom if freedom else 1.0)
    return mean, np.sqrt(np.maximum(variance, _SMALLEST) * (1 + 1 / some))


def rmia(
    target: Signals,
    shadows: Signals,
    inside: Inside,
    population: NDArray[np.int64],
    *,
    online: bool = True,
    gamma: float = 1.0,
    scaling: float = 0.3,
) -> Signals:
    """Return the share of the population that each example outdoes, (n,); NaN as in :func:`lira`.

    The likelihood ratio of an example is its probability under the target over the mean under
    shadows; its score is how often it is ``gamma`` times that of an example of the population.

    Args:
      target: (n,) signals of the model that is attacked.
      shadows: (s, n) signals of the shadow models.
      inside: (s, n) whether the shadow trained on the example.
      population: Examples to compare with.
      online: Average over shadows with and without the example; else over those without, whose mean
        ``o`` stands for ``((1 + a) o + 1 - a) / 2``.
      gamma: How much higher the ratio must be.
      scaling: a.

    Reference:
      Zarifzadeh, Liu and Shokri 2024, "Low-cost high-power membership inference attacks", section
      2 and appendix B.2.2.
    """
    probability = expit(shadows)

    def mean(chosen: Inside) -> Signals:
        count = chosen.sum(axis=0)
        total = np.where(chosen, probability, 0.0).sum(axis=0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    out = mean(~inside)
    expected = (out + mean(inside)) / 2 if online else ((1 + scaling) * out + 1 - scaling) / 2
    ratio = expit(target) / np.maximum(expected, 1e-12)
    others = np.sort(ratio[population])
    others = others[~np.isnan(others)]
    beaten = np.searchsorted(others, ratio / gamma, side="right") / max(len(others), 1)
    return np.where(np.isnan(ratio), np.nan, beaten)


def over_rounds(scores: Sequence[Signals]) -> Signals:
    """Return the joint score of several rounds' models: likelihood ratios add up."""
    return np.asarray(np.sum(scores, axis=0), np.float64)


def null_deviation(measures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far each client's measure lies above the others', (clients, n), in deviations.

    An example is in the data of few clients, so those who trained beside one show what its measure
    is without it: no shadow model is needed.

    Args:
      measures: (clients, n) of each update and each example, such as by how much the update lowers
        the example's loss.

    Reference:
      Zhu et al. 2025, "FedMIA: an effective membership inference attack exploiting the 'All for
      One' principle in federated learning", CVPR.
    """
    clients = len(measures)
    if clients < 3:
        raise ConfigError(f"to compare a client's update with others', 3 are needed, not {clients}")
    total, squares = measures.sum(axis=0), (measures**2).sum(axis=0)
    mean = (total - measures) / (clients - 1)
    variance = (squares - measures**2) / (clients - 1) - mean**2
    return np.asarray((measures - mean) / np.sqrt(np.maximum(variance, 1e-6)), np.float64)
