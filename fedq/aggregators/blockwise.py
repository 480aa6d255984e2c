"""Rules in two steps: mix the updates by their inner products, then reduce every coordinate.

What compares whole updates (Krum, geometric median, ...) needs their inner products alone. One
pass over the (n, d) block gives the (n, n) Gram matrix, all decisions are made on it, and a second
pass mixes. So n**2 + n numbers are held beside the input, never n**2 d, and rules nest: the Gram
matrix of mixed updates is that of the mixing.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Aggregator, Weights
from fedq.errors import ConfigError
from fedq.jit import jit
from fedq.layout import Vector

Matrix = NDArray[np.float64]

#: Values that a rule holds at once beside its input: 8 MiB of float32, 16 MiB of float64.
BLOCK_VALUES = 1 << 21
_TILE = 1 << 16  # float64 values that stay in the second-level cache
#: Coefficients keep this many bits: what BLAS rounds its own way on each machine does not show.
_COEFFICIENT_BITS = 40
_ROUNDING = 2.0**-44


class Products:
    """The inner products of n updates, computed when they are first asked for.

    Attributes:
      n: Number of updates.
    """

    def __init__(self, updates: NDArray[np.float32] | None, gram: Matrix | None = None) -> None:
        self._updates = updates
        if gram is not None:
            self.gram = gram  # shadows the property
        self.n = len(gram if updates is None else updates)  # type: ignore[arg-type]

    @cached_property
    def gram(self) -> Matrix:
        """(n, n) inner products; summed in float64, from pieces of the float32 input."""
        assert self._updates is not None
        updates = self._updates
        result = np.zeros((self.n, self.n))
        step = max(1, BLOCK_VALUES // self.n)
        for start in range(0, updates.shape[1], step):
            block = updates[:, start : start + step].astype(np.float64)
            result += block @ block.T
        return result

    @cached_property
    def distances(self) -> Matrix:
        """(n, n) squared Euclidean distances; 0 where cancellation leaves nothing but rounding."""
        squares = np.diag(self.gram)
        sums = squares[:, None] + squares
        result = sums - 2 * self.gram
        result[result < _ROUNDING * sums] = 0
        np.fill_diagonal(result, 0)
        return result

    @property
    def norms(self) -> NDArray[np.float64]:
        """(n,) Euclidean norms."""
        return np.sqrt(np.diag(self.gram))

    def mixed(self, mixing: Matrix) -> Products:
        """Return the products of the (m,) updates ``mixing @ updates``."""
        return Products(None, mixing @ self.gram @ mixing.T)

    def distances_to(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the (n,) distances to the combination ``coefficients @ updates``."""
        products = self.gram @ coefficients
        square = np.diag(self.gram) - 2 * products + coefficients @ products
        return np.sqrt(np.maximum(square, 0))

    def central(self) -> NDArray[np.float64]:
        """Return (n,) coefficients of a robust centre: the mean of a tight majority.

        The ``n // 2 + 1`` updates nearest to the one whose majority is the nearest. With fewer than
        half of the updates hostile, any majority has an honest member, so the centre is within a
        few honest diameters of the honest ones.
        """
        most = self.n // 2 + 1
        order = np.argsort(self.distances, axis=1, kind="stable")[:, :most]
        near = np.take_along_axis(self.distances, order, axis=1)
        best = np.lexsort((near.sum(axis=1), near[:, -1]))[0]  # ties: the farthest of each other
        return indicator(order[best], self.n) / most


def indicator(chosen: NDArray[np.intp], n: int) -> NDArray[np.float64]:
    """Return (n,) ones at the chosen places, zeros elsewhere."""
    result = np.zeros(n)
    result[chosen] = 1.0
    return result


class Blockwise(Aggregator):
    """A rule ``v_j = reduce((W U)_j)`` whose mixing W depends on ``U U^T`` and the weights."""

    def __post_init__(self) -> None:
        """Refuse an inner rule that cannot stand inside."""
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            inner = getattr(self, option.name)
            if isinstance(inner, Aggregator) and not isinstance(inner, Blockwise):
                raise ConfigError(
                    f"aggregator={inner.name} cannot stand inside {self.name}; "
                    f"choose another aggregator.{option.name}"
                )

    def _mixing(self, products: Products, weights: Weights) -> Matrix | None:
        """Return the (m, n) mixing, None for the updates as they are."""
        return None

    def _reduce(self, values: NDArray[np.float32], n: int) -> Vector:
        """Reduce (m, k) mixed values of k coordinates of n updates to (k,); must not write."""
        if len(values) != 1:
            raise AssertionError(f"aggregator={self.name} leaves {len(values)} rows")
        row: Vector = values[0]
        return row

    def _aggregate(self, updates: NDArray[np.float32], weights: Weights) -> Vector:
        n, d = updates.shape
        mixing = self._mixing(Products(updates), weights)
        if mixing is None:
            return self._reduce(updates, n)
        out = np.empty(d, np.float32)
        step = max(1, BLOCK_VALUES // len(mixing))
        for start in range(0, d, step):
            values = np.empty((len(mixing), min(step, d - start)), np.float32)
            mix(updates, steady(mixing), start, values)
            out[start : start + step] = self._reduce(values, n)
        return out


class Selecting(Blockwise):
    """A blockwise rule that survives a stated number of hostile updates.

    Args:
      f: Hostile updates to survive: a count (int), or a fraction of the updates (float).
    """

    f: int | float

    #: The rule needs ``n >= least[0] f + least[1]`` updates (unless f = 0).
    least: ClassVar[tuple[int, int]] = (2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hostile(self.f, self.name, self.least)

    def breakdown(self, n: int) -> int:
        """``f``, if there are enough updates for it."""
        f = hostile(self.f, n)
        return f if n >= self.least[0] * f + self.least[1] else 0

    def check(self, n: int) -> None:
        """Refuse too few updates for ``f``."""
        enough(self.f, n, self.name, self.least)

    def _hostile(self, n: int) -> int:
        """Return f of n updates, checked."""
        return enough(self.f, n, self.name, self.least)


def hostile(f: int | float, n: int) -> int:
    """Return how many of n updates are meant by a count or a fraction.

    >>> hostile(3, 10), hostile(0.29, 100)
    (3, 29)
    """
    return f if isinstance(f, int) else math.floor(f * n + 1e-9)  # 0.29 * 100 is 28.999999999999996


def check_hostile(f: int | float, name: str, least: tuple[int, int]) -> None:
    """Raise a ConfigError unless ``f`` is a count, or a fraction that some cohort satisfies."""
    if not (f >= 0 and (isinstance(f, int) or f < 1 / least[0])):
        raise ConfigError(
            f"aggregator.f must be a count from 0, or a fraction in [0, 1/{least[0]}), not {f}: "
            f"{name} needs n >= {_formula(least)}"
        )


def enough(f: int | float, n: int, name: str, least: tuple[int, int]) -> int:
    """Return f of n updates; ConfigError if they are too few to survive so many."""
    count = hostile(f, n)
    if count and n < least[0] * count + least[1]:
        raise ConfigError(
            f"aggregator={name} needs n >= {_formula(least)} updates, and has n = {n}, "
            f"f = {count}; lower aggregator.f or raise clients_per_round"
        )
    return count


def _formula(least: tuple[int, int]) -> str:
    return f"{least[0]} f + {least[1]}"


def steady(coefficients: Matrix) -> Matrix:
    """Round coefficients to 40 bits of the largest, so that their last bits decide nothing."""
    largest = float(np.abs(coefficients).max(initial=0))
    if not largest:
        return coefficients
    unit = 2.0 ** (math.frexp(largest)[1] - _COEFFICIENT_BITS)
    return np.asarray(np.rint(coefficients / unit) * unit)


def combine(updates: NDArray[np.float32], coefficients: NDArray[np.float64]) -> Vector:
    """Return ``coefficients @ updates``, (d,) float32, summed in float64 in the order of rows."""
    out = np.empty((1, updates.shape[1]), np.float32)
    mix(updates, steady(coefficients[None]), 0, out)
    row: Vector = out[0]
    return row


@jit
def mix(updates: NDArray[np.float32], mixing: Matrix, start: int, out: NDArray[np.float32]) -> None:
    """Write columns ``start, start + 1, ...`` of ``mixing @ updates`` to ``out``, (m, k)."""
    # Loops, not BLAS: the order of additions, hence the result, is the same on every machine.
    rows, count = out.shape
    n = mixing.shape[1]
    width = max(1, min(count, _TILE // n))
    tile, sums = np.empty((n, width), np.float64), np.empty(width, np.float64)
    for first in range(0, count, width):
        size = min(width, count - first)
        for i in range(n):
            for j in range(size):
                tile[i, j] = updates[i, start + first + j]
        for r in range(rows):
            sums[:size] = 0.0
            used = np.flatnonzero(mixing[r])
            whole = used.size // 4 * 4
            for k in range(0, whole, 4):  # four rows per pass over the sums, still in order
                a, b, c, d = used[k], used[k + 1], used[k + 2], used[k + 3]
                wa, wb, wc, wd = mixing[r, a], mixing[r, b], mixing[r, c], mixing[r, d]
                for j in range(size):
                    total = sums[j] + wa * tile[a, j]
                    total += wb * tile[b, j]
                    total += wc * tile[c, j]
                    sums[j] = total + wd * tile[d, j]
            for k in range(whole, used.size):
                a = used[k]
                wa = mixing[r, a]
                for j in range(size):
                    sums[j] += wa * tile[a, j]
            for j in range(size):
                out[r, first + j] = sums[j]
