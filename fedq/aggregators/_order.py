"""Order statistics of every coordinate: sorting networks across the coordinates of a tile.

A network compares the same rows whatever their values, so its comparisons run over many coordinates
at once, in the order in which updates lie in memory: no transposition, no branch. Batcher's
odd-even merge sort has ``O(n log(n)**2)`` comparisons (Batcher 1968, "Sorting networks and their
applications").
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedq.jit import COMPILED, jit
from fedq.layout import Vector

_TILE = 1 << 14  # float32 values that stay in a core's own caches
_LANES = 64  # of a few vector registers: what is not a multiple goes one by one


def middle_mean(values: NDArray[np.float32], low: int, high: int) -> Vector:
    """Return the mean of the order statistics ``low .. high - 1`` of each column.

    Args:
      values: (m, k) float32, finite; not written to.
      low: First order statistic, from 0.
      high: One beyond the last.

    Returns:
      (k,) float32, summed in float64.
    """
    if not COMPILED:
        ordered = np.sort(values, axis=0)[low:high]
        return np.asarray(ordered.mean(axis=0, dtype=np.float64), np.float32)
    out = np.empty(values.shape[1], np.float32)
    _middle_mean(values, network(len(values)), low, high, out)
    return out


def mean_near_median(values: NDArray[np.float32], count: int) -> Vector:
    """Return the mean of the ``count`` values of each column that are nearest to its median.

    Args:
      values: (m, k) float32, finite; not written to.
      count: From 1 to m.

    Returns:
      (k,) float32, summed in float64.
    """
    out = np.empty(values.shape[1], np.float32)
    _mean_near_median(values, network(len(values)), count, out)
    return out


@cache
def network(m: int) -> NDArray[np.int64]:
    """Return Batcher's network for m values: (c, 2) places to compare, the smaller one first.

    >>> network(3).tolist()
    [[0, 1], [0, 2], [1, 2]]
    """
    pairs: list[tuple[int, int]] = []
    p = 1
    while p < m:
        k = p
        while k:
            for j in range(k % p, m - k, 2 * k):
                places = range(j, min(j + k, m - k))
                pairs += [(i, i + k) for i in places if i // (2 * p) == (i + k) // (2 * p)]
            k //= 2
        p *= 2
    return np.array(pairs, np.int64).reshape(-1, 2)


@jit(allocates=False)
def _load(values, start, size, tile):  # type: ignore[no-untyped-def]
    """Copy columns of values into a tile."""
    for i in range(values.shape[0]):
        for j in range(size):
            tile[i, j] = values[i, start + j]


@jit(allocates=False)
def _sort(tile, size, pairs):  # type: ignore[no-untyped-def]
    """Sort the first ``size`` columns of a tile."""
    for c in range(pairs.shape[0]):
        p, q = pairs[c, 0], pairs[c, 1]
        for j in range(size):
            a, b = tile[p, j], tile[q, j]
            tile[p, j] = a if a < b else b
            tile[q, j] = b if a < b else a


@jit(allocates=False)
def _add(tile, row, size, sums):  # type: ignore[no-untyped-def]
    """Add a row of a tile."""
    for j in range(size):
        sums[j] += tile[row, j]


@jit
def _middle_mean(
    values: NDArray[np.float32],
    pairs: NDArray[np.int64],
    low: int,
    high: int,
    out: NDArray[np.float32],
) -> None:
    m, k = values.shape
    width = max(_LANES, _TILE // m // _LANES * _LANES)
    tile, sums = np.empty((m, width), np.float32), np.empty(width, np.float64)
    for start in range(0, k, width):
        size = min(width, k - start)
        _load(values, start, size, tile)
        _sort(tile, size, pairs)
        sums[:size] = 0.0
        for i in range(low, high):
            _add(tile, i, size, sums)
        for j in range(size):
            out[start + j] = sums[j] / (high - low)


@jit
def _mean_near_median(
    values: NDArray[np.float32], pairs: NDArray[np.int64], count: int, out: NDArray[np.float32]
) -> None:
    m, k = values.shape
    width = max(_LANES, _TILE // m // _LANES * _LANES)
    tile = np.empty((m, width), np.float32)
    for start in range(0, k, width):
        size = min(width, k - start)
        _load(values, start, size, tile)
        _sort(tile, size, pairs)
        for j in range(size):
            median = (np.float64(tile[(m - 1) // 2, j]) + np.float64(tile[m // 2, j])) / 2
            low, high = 0, m
            while high - low > count:  # the nearest ones are neighbours: drop the farther end
                if median - tile[low, j] > tile[high - 1, j] - median:
                    low += 1
                else:
                    high -= 1
            total = 0.0
            for i in range(low, high):
                total += tile[i, j]
            out[start + j] = total / count
