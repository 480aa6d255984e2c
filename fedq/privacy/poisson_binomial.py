"""Poisson-binomial mechanism: the code itself is the noise, Chen et al. 2022, arXiv:2207.09916."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.codecs._hadamard import piece_sizes
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.privacy._distributed import Distributed, Encoder
from fedq.privacy._entropy import Entropy
from fedq.privacy._ledger import ORDERS, Rdp
from fedq.privacy._samplers import Integers
from fedq.privacy.base import Round
from fedq.random import derive
from fedq.registry import register

#: Rotated coordinates beyond this many standard deviations are cut off.
CUT = 4.0
MAX_THETA = 0.25
_CHUNK = 1 << 16
BETWEEN = 1.01  #: see :func:`coordinate_rdp`


@register("privacy", "poisson_binomial")
class PoissonBinomial(Distributed):
    """Each coordinate becomes the number of heads in ``levels`` tosses of a coin it biases.

    A rotated coordinate x, cut off at ``B = 4 C / sqrt(d)``, is sent as Binomial(m, 1/2 + t x / B),
    an integer from 0 to m. No noise is added: that of the tosses suffices, and a code takes
    ``log2(m + 1)`` bits. The bias is such that the noise of a full cohort's sum has the standard
    deviation ``z C``: ``t = 4 sqrt(n) / (2 z sqrt(m d))``, at most 1/4.

    The RDP is computed, not bounded by constants: see :func:`coordinate_rdp`.

    Args:
      levels: m, tosses per coordinate.

    Example:
      >>> from fedq.registry import build
      >>> privacy = build("privacy", "poisson_binomial", noise_multiplier=1.0)
      >>> encoder = privacy.encoder(Round(number=1, seed=0, cohort=100, size=131072))
      >>> encoder.largest, encoder.bits, round(encoder.theta, 4)
      (1, 7, 0.0552)

    Reference:
      Chen, Ozgur and Kairouz 2022, "The Poisson binomial mechanism for unbiased federated learning
      with secure aggregation", algorithms 1 and 2 (with the Hadamard rotation in place of
      Kashin's representation).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"noise_multiplier": 1.0},
        {"noise_multiplier": 1.0, "levels": 16, "clip": 0.1, "seeded": True},
    )

    levels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= 1023:
            raise ConfigError(f"privacy.levels must be from 1 to 1023, not {self.levels}")

    def encoder(self, about: Round) -> BinomialCodes:
        """Return the round's encoder."""
        seed = derive(about.seed, about.number, "rotation")
        count = sum(piece_sizes(about.size))
        theta = CUT * math.sqrt(about.cohort / (self.levels * count)) / (2 * self.sigma)
        if theta > MAX_THETA:
            levels = math.ceil(self.levels * (theta / MAX_THETA) ** 2)
            raise ConfigError(
                f"privacy.levels={self.levels} make more noise than {self.sigma:.3g} over "
                f"{about.size} coordinates; take at least {levels}, or raise the noise"
            )
        return BinomialCodes(about.size, self.clip, about.cohort, seed, self.levels, theta)

    def rdp(self, replies: int, about: Round) -> Rdp:
        """Return what a sum of ``replies`` clients costs each of them."""
        encoder = self.encoder(about)
        # Coordinates are independent, and their squared biases sum to at most this.
        squares = encoder.theta**2 * encoder.count / CUT**2
        return squares * coordinate_rdp(replies, self.levels, encoder.theta)


@dataclass(frozen=True)
class BinomialCodes(Encoder):
    """Vectors as heads of biased coins.

    Attributes:
      levels: m, tosses per coordinate.
      theta: The largest bias.
    """

    size: int
    clip: float
    cohort: int
    seed: int
    levels: int
    theta: float

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of the largest sum."""
        return (self.cohort * self.levels).bit_length()

    @property
    def largest(self) -> int:
        """The largest code of one client."""
        return self.levels

    @property
    def cut(self) -> float:
        """B, the largest rotated coordinate."""
        return CUT * self.clip / math.sqrt(self.count)

    def encode(self, x: Vector, entropy: Entropy) -> Integers:
        """Return the codes of a (d,) float32 vector, (count,) int64 in [0, levels]."""
        bias = np.clip(self._rotated(x) / self.cut, -1, 1) * self.theta
        # Towards 1/2, so that no bias grows by rounding; a coin is a 32-bit comparison.
        heads = (2**31 + np.trunc(bias * 2**32)).astype(np.uint32)
        codes = np.empty(self.count, np.int64)
        for start in range(0, self.count, _CHUNK):
            chosen = heads[start : start + _CHUNK]
            words = entropy.words(-(-chosen.size * self.levels // 2)).view(np.uint32)
            coins = words[: chosen.size * self.levels].reshape(chosen.size, self.levels)
            codes[start : start + _CHUNK] = np.count_nonzero(coins < chosen[:, None], axis=1)
        return codes

    def decode(self, total: Integers, n: int) -> Vector:
        """Return the mean of n vectors."""
        centred = (total & ((1 << self.bits) - 1)).astype(np.float64)
        centred -= 0.5 * n * self.levels
        centred *= self.cut / (n * self.levels * self.theta)
        return self._derotated(centred)


@lru_cache(maxsize=32)
def coordinate_rdp(replies: int, levels: int, theta: float) -> Rdp:
    """Return c with ``D_alpha <= c[alpha] b**2`` for every bias ``|b| <= theta``, (orders,).

    D compares the sum of all codes when one client's coin has bias b and when it has none. Any
    other client's coin, of bias up to theta, is a fair coin with probability ``1 - 2 theta``,
    whatever its data. So the others' sum holds ``Binomial(M, 1/2)`` with M itself binomial; to tell
    M and the rest helps the adversary only, and then the Rényi divergence is an average over M of
    ``exp((alpha - 1) D)``, computed from two binomial sums each. Values of M are put into a few
    classes, each with the divergence of its least. ``D / b**2`` is evaluated at eight biases;
    between and below them it is smooth, and what it may exceed them by is added. At orders beyond
    64 it is not, and they are left out.
    """
    others = (replies - 1) * levels
    mass = _binomial(others, 1 - 2 * theta)
    cumulative = np.cumsum(mass)
    least = [0, *(int(np.searchsorted(cumulative, q)) for q in (1e-12, 1e-6, 1e-2, 0.2, 0.5, 0.8))]
    edges = sorted(set(least))
    weights = [float(mass[a:b].sum()) for a, b in zip(edges, [*edges[1:], others + 1], strict=True)]
    worst = np.zeros(len(ORDERS))
    for b in theta * 2.0 ** (-np.arange(8) / 2):
        moments = np.zeros((2, len(ORDERS)))
        for fair, weight in zip(edges, weights, strict=True):
            p = np.convolve(_binomial(levels, 0.5 + b), _binomial(fair, 0.5))
            q = _binomial(levels + fair, 0.5)
            moments[0] += weight * _moments(p, q)
            moments[1] += weight * _moments(q, p)
        worst = np.maximum(worst, np.log1p(moments.max(0)) / ((ORDERS - 1) * b**2))
    return np.where(ORDERS <= 64, worst * BETWEEN, np.inf)


def _moments(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``sum q (p / q)**alpha - 1`` for each order, without cancellation."""
    seen = (p > 0) & (q > 0)
    p, q = p[seen], q[seen]
    ratio = (p - q) / q
    with np.errstate(over="ignore"):
        powers = np.expm1(ORDERS[:, None] * np.log1p(ratio)) - ORDERS[:, None] * ratio
        moments: NDArray[np.float64] = np.maximum((q * powers).sum(1), 0.0)
    return moments


def _binomial(n: int, p: float) -> NDArray[np.float64]:
    """Return the probabilities of 0 to n heads."""
    k = np.arange(1, n + 1)
    choose = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    heads = np.arange(n + 1)
    logs = choose + heads * math.log(p) + (n - heads) * math.log1p(-p)
    out: NDArray[np.float64] = np.exp(logs)
    out /= out.sum()
    return out
