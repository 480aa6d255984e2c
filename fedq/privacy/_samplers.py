"""Integer noise without floating-point arithmetic, from a stream of random words.

Floating-point noise leaks through its low bits (Mironov 2012, "On significance of the least
significant bits for differential privacy"). :func:`discrete_gaussian` is exact for any size;
:class:`Table` is thirty times as fast where a distribution has few enough values, and within a
statistical distance of 2**-100 of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.jit import jit
from fedq.privacy._entropy import Entropy

Integers = NDArray[np.int64]

MAX_SIGMA = 1 << 24
MAX_TABLE_SIGMA = 1 << 14
_RESERVE = 1 << 11  # words that no single sample needs, but with probability below 2**-500
_WORDS_PER_SAMPLE = 24  # on average, with some to spare
_CHUNK = 1 << 16


def discrete_gaussian(sigma: int, count: int, entropy: Entropy) -> Integers:
    """Return integers k with probability in proportion to ``exp(-k**2 / (2 sigma**2))``.

    Exactly so: Canonne, Kamath and Steinke's rejection sampler in 64-bit integers, which an integer
    ``sigma`` makes possible. The variance is at most ``sigma**2``, and equal to it up to a relative
    ``exp(-2 (pi sigma)**2)``.

    Args:
      sigma: From 1 to 2**24.
      count: Samples.
      entropy: Where randomness comes from.

    Example:
      >>> x = discrete_gaussian(3, 20_000, Entropy(0))
      >>> x.dtype.name, abs(float(x.std()) - 3) < 0.1
      ('int64', True)

    Reference:
      Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential privacy",
      algorithms 1 to 3.
    """
    if not 1 <= sigma <= MAX_SIGMA:
        raise ConfigError(f"a discrete Gaussian needs sigma from 1 to 2**24, not {sigma}")
    out = np.empty(count, np.int64)
    done = 0
    while done < count:
        wanted = min(_CHUNK, count - done)
        words = entropy.words(_RESERVE + _WORDS_PER_SAMPLE * wanted)
        done += int(_discrete_gaussian(words, sigma, out[done : done + wanted], _RESERVE))
    return out


@jit
def _below(words, at, limit):  # type: ignore[no-untyped-def]
    """Return a uniform integer in [0, limit), and the place of the next unused word."""
    bits = 1
    while limit - 1 >> bits:
        bits += 1
    shift = np.uint64(64 - bits)
    while True:
        value = np.int64(words[at] >> shift)
        at += 1
        if value < limit:
            return value, at


@jit
def _bernoulli_exp(words, at, numerator, denominator):  # type: ignore[no-untyped-def]
    """Return whether an event of probability exp(-numerator / denominator) <= 1 happens."""
    while numerator > denominator:  # exp(-1), as often as it takes
        k = 1
        while True:
            value, at = _below(words, at, k)
            if value:
                break
            k += 1
        if not k & 1:
            return False, at
        numerator -= denominator
    k = 1
    while True:
        value, at = _below(words, at, denominator * k)
        if value >= numerator:
            break
        k += 1
    return k & 1 == 1, at


@jit
def _discrete_gaussian(words, sigma, out, reserve):  # type: ignore[no-untyped-def]
    """Fill ``out`` as far as the words go; return how far."""
    at, done = 0, 0
    while done < out.size and at + reserve <= words.size:
        low, at = _below(words, at, sigma)
        kept, at = _bernoulli_exp(words, at, low, sigma)
        if not kept:
            continue
        high = 0
        more, at = _bernoulli_exp(words, at, 1, 1)
        while more:
            high += 1
            more, at = _bernoulli_exp(words, at, 1, 1)
        size = low + sigma * high
        negative, at = _below(words, at, 2)
        if negative and size == 0:
            continue
        # A discrete Laplace of scale sigma; what is left of exp(-k^2 / 2 sigma^2) is this.
        kept, at = _bernoulli_exp(words, at, (size - sigma) ** 2, 2 * sigma * sigma)
        if kept:
            out[done] = -size if negative else size
            done += 1
    return done


@dataclass(frozen=True)
class Table:
    """A distribution over consecutive integers, for inversion with 128-bit uniform numbers.

    Attributes:
      first: The smallest integer.
      high: (k,) upper words of the cumulative probabilities times 2**128, saturated.
      low: (k,) lower words.
      guide: For every value of a uniform number's upper bits, where the search may begin.
    """

    first: int
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    guide: NDArray[np.int64]

    @classmethod
    def of(cls, first: int, masses: list[int]) -> Table:
        """Return the table of probabilities in proportion to ``masses``, which are integers."""
        total, running, high, low = sum(masses), 0, [], []
        mask = (1 << 64) - 1
        for mass in masses:
            running += mass
            cumulative = min((running << 128) // total, (1 << 128) - 1)
            high.append(cumulative >> 64)
            low.append(cumulative & mask)
        upper = np.array(high, np.uint64)
        bits = min(16, max(1, len(masses).bit_length()))
        starts = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
        guide = np.searchsorted(upper, starts).astype(np.int64)
        return cls(first, upper, np.array(low, np.uint64), guide)

    def sample(self, count: int, entropy: Entropy) -> Integers:
        """Return ``count`` independent samples, (count,) int64."""
        words = entropy.words(count)
        out = np.empty(count, np.int64)
        # A tie of the upper words, of probability k 2**-64, is what the second word decides.
        _invert(words, entropy.words(64), self.high, self.low, self.guide, out)
        out += self.first
        return out


@jit
def _invert(words, ties, high, low, guide, out):  # type: ignore[no-untyped-def]
    shift = np.uint64(64)
    size = guide.size
    while size > 1:
        size >>= 1
        shift -= np.uint64(1)
    tie = 0
    for i in range(words.size):
        word = words[i]
        k = guide[np.int64(word >> shift)]
        while k < high.size - 1 and word > high[k]:
            k += 1
        while k < high.size - 1 and word == high[k] and ties[tie % ties.size] >= low[k]:
            k += 1
            tie += 1
        out[i] = k


@lru_cache(maxsize=4)
def gaussian_table(sigma: float) -> Table:
    """Return the discrete Gaussian, probabilities in proportion to ``exp(-k**2 / (2 sigma**2))``.

    >>> x = gaussian_table(2.5).sample(20_000, Entropy(0))
    >>> abs(float(x.std()) - 2.5) < 0.1
    True
    """
    if not 0 < sigma <= MAX_TABLE_SIGMA:
        raise ConfigError(f"a table needs a standard deviation in (0, 2**14], not {sigma}")
    with localcontext() as context:
        context.prec = 80
        ratio = (-1 / (2 * Decimal(sigma) ** 2)).exp()  # of the first two; then by its square
        unit = 1 << 256
        step, square = int(ratio * unit), int(ratio**2 * unit)
    masses = [1 << 192]
    for _ in range(math.ceil(13 * sigma) + 8):
        masses.append(masses[-1] * step >> 256)
        step = step * square >> 256
    return Table.of(1 - len(masses), [*masses[:0:-1], *masses])


@lru_cache(maxsize=4)
def skellam_table(variance: float) -> Table:
    """Return the symmetric Skellam distribution, ``Poisson(v / 2) - Poisson(v / 2)``.

    Its probabilities are ``exp(-v) I_k(v)`` with modified Bessel functions, from the recurrence
    ``I_(k-1) = I_(k+1) + (2 k / v) I_k`` in integers, downwards, where it is stable (Miller's
    algorithm). What is left out at the ends has a probability below 2**-100.

    >>> x = skellam_table(9.0).sample(20_000, Entropy(0))
    >>> abs(float(x.std()) - 3) < 0.1
    True
    """
    if not 0 < variance <= MAX_TABLE_SIGMA**2:
        raise ConfigError(f"a table needs a variance in (0, 2**28], not {variance}")
    numerator, denominator = float(variance).as_integer_ratio()
    last = math.ceil(13 * math.sqrt(variance)) + 64
    masses, above, here = [], 0, 1 << 96
    for k in range(last, 0, -1):
        masses.append(here)
        above, here = here, above + 2 * k * here * denominator // numerator
    masses.append(here)
    return Table.of(-last, [*masses, *masses[-2::-1]])
