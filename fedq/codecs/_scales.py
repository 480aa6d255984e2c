"""Scales of rows and columns: side information that says where a vector is large.

The standard deviation at row r and column c of a tensor is modelled as ``s_r s_c / s``, the product
of the root mean squares of row and column over that of the tensor, in half octaves of the step.
From it follow step and sampling of each coordinate (:func:`law`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from fedq.codecs import _range
from fedq.errors import DecodeError
from fedq.jit import jit
from fedq.layout import Layout, Vector

Index = NDArray[np.int32]

#: Half octaves of sigma over step that :func:`law` tells apart: -HALF ... HALF - 1.
HALF = 64
#: Of an index: the row or column is zero.
DEAD = -(1 << 12)
#: Sampling probabilities are multiples of 1 / WHOLE.
WHOLE = 512
_LEAST = 8  # a row or a column of fewer coordinates has no scale of its own
_FLAT = 1024  # vectors from this size on are folded into rows
_LIMIT = 1 << 9
_WORTH = 0.36  # of a bit, in squares of the step: the law's slope
_KNEE = -4  # half octaves of sigma over step from which on all coordinates are sent


def geometry(layout: Layout) -> list[tuple[int, int]]:
    """Return size and columns of each tensor; long vectors are folded into rows."""
    shapes = []
    for tensor in layout:
        width = tensor.size // max(tensor.rows, 1)
        if tensor.rows == 1 and tensor.size >= _FLAT:
            width = 1 << tensor.size.bit_length() // 2
        shapes.append((tensor.size, max(width, 1)))
    return shapes


@dataclass(frozen=True)
class Law:
    """What a coordinate's scale decides, by half octave of sigma over step, each (2 HALF,).

    Attributes:
      keep: Chance of being sent, in 1 / WHOLE; int64.
      multiplier: Of the step, float64.
      bits: Expected bits of the coordinate.
      error: Expected squared error in squares of the step.
    """

    keep: NDArray[np.int64]
    multiplier: NDArray[np.float64]
    bits: NDArray[np.float64]
    error: NDArray[np.float64]

    @cached_property
    def worth(self) -> NDArray[np.float64]:
        """Expected error plus what bits are worth, in squares of the step."""
        return self.error + _WORTH * self.bits


@cache
def law(sampling: bool, error: float) -> Law:
    """Return steps and sampling of least error for given bits.

    A Gaussian of deviation s takes about ``log2(1 + (1.9 s / step)^2) / 2`` bits at this step, and
    costs ``error step^2``. Equal slopes everywhere then mean ``step^2 (1 + (step / 1.9 s)^2)`` is
    the same for all coordinates. Below some two thirds of a bit it is better to send only a share
    p of the coordinates, divided by p, at their best operating point: ``p ~ s``. Without sampling,
    the step of small coordinates follows ``s^(1/3)``, as bits there fall like ``s / step``.

    Everything that decodes uses +, *, / and sqrt only, which every machine rounds alike.
    """
    index = np.arange(-HALF, HALF)
    sigma = _half_octaves(index)
    q = 1 / np.square(1.9 * sigma)
    multiplier = np.sqrt(2 / (1 + np.sqrt(1 + 4 * q)))
    knee = multiplier[HALF + _KNEE]
    below = index < _KNEE
    keep = np.full(2 * HALF, WHOLE)
    if sampling:
        share = _half_octaves(index - _KNEE)
        keep[below] = np.maximum(1, np.rint(WHOLE * share[below]))
        multiplier[below] = knee
    else:
        # Cube roots of half octaves: 2**(k / 6).
        sixths = np.array([1, 1.122462048309373, 1.259921049894873, 2**0.5,
                           1.5874010519681994, 1.7817974362806785])  # fmt: skip
        k = index - _KNEE
        multiplier[below] = (knee * np.ldexp(sixths[k % 6], k // 6))[below]
    p = keep / WHOLE
    ratio = sigma / p / multiplier
    bits = p * (0.5 * np.log2(1 + np.square(1.9 * ratio)) + 0.12 * np.minimum(1, ratio))
    lost = p * error * np.square(multiplier) + np.square(sigma) * (1 / p - 1)
    return Law(keep, multiplier, bits, lost)


def _half_octaves(index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``2**(index / 2)``, the same on every machine."""
    return np.ldexp(np.where(index % 2, 2**0.5, 1.0), index // 2)


@dataclass(frozen=True)
class Scales:
    """Half octaves of sigma over step: rows, and columns relative to their tensor.

    Attributes:
      rows: One (rows,) int32 per tensor; :data:`DEAD` where a row is zero.
      columns: One (columns,) int32 per tensor; :data:`DEAD` where a column is zero.
    """

    rows: list[Index]
    columns: list[Index]

    @property
    def even(self) -> bool:
        """Whether all rows and all columns of each tensor are alike."""
        return all(np.ptp(part) == 0 for part in (*self.rows, *self.columns) if part.size)


class Profile:
    """Root mean squares of all rows and columns of a vector, as logarithms."""

    def __init__(self, x: Vector, layout: Layout) -> None:
        self._spreads = []
        start = 0
        for size, width in geometry(layout):
            rows, columns = np.zeros(-(-size // width)), np.zeros(width)
            _squares(x[start : start + size], rows, columns)
            self._spreads.append(_Spread(size, rows, columns))
            start += size

    @classmethod
    def of_matrix(cls, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> Profile:
        """Return the profile of a matrix of these sums of squares."""
        profile = cls.__new__(cls)
        profile._spreads = [_Spread(rows.size * columns.size, rows, columns)]
        return profile

    def at(self, step: float, law: Law | None = None) -> Scales:
        """Return the scales for a step; with a law, in as much detail as they are worth there."""
        found = [spread.at(step, law) for spread in self._spreads]
        return Scales([rows for rows, _ in found], [columns for _, columns in found])

    def expect(self, step: float, law: Law, detail: Law | None = None) -> tuple[float, float]:
        """Return expected bits and squared error by ``law``, with the scales of ``at(detail)``."""
        bits = error = 0.0
        for spread in self._spreads:
            more, lost = spread.expect(step, law, detail)
            bits, error = bits + more, error + lost
        return bits, error * step * step


class _Spread:
    """Scales of one tensor: log2 of its power, and offsets of rows and columns in each detail."""

    def __init__(self, size: int, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> None:
        """Take the sums of squares of rows and columns; the last row may be short."""
        count, width = rows.size, columns.size
        mean = float(rows.sum()) / max(size, 1)
        self._pairs: dict[tuple[int, int], tuple[NDArray[np.float64], int]] = {}
        if not mean:
            self._power = 0.0
            self._rows = [(np.full(count, DEAD, np.int32), 0.0)]
            self._columns = [(np.full(width, DEAD, np.int32), 0.0)]
            return
        last = size - (count - 1) * width
        by_row, by_column = _scaled(size, width)
        row, column = np.ones(count), np.ones(width)
        if by_row:
            row = rows / np.where(np.arange(count) == count - 1, last, width) / mean
        if by_column:
            column = columns / np.where(np.arange(width) < last, count, count - 1) / mean
        self._power = float(np.log2(mean))
        self._rows, self._columns = _details(row), _details(column)

    def at(self, step: float, law: Law | None) -> tuple[Index, Index]:
        """Return rows and columns."""
        base = self._base(step)
        i, j = self._choose(base, law)
        rows = self._rows[i][0]
        return np.where(rows == DEAD, DEAD, base + rows).astype(np.int32), self._columns[j][0]

    def expect(self, step: float, law: Law, detail: Law | None) -> tuple[float, float]:
        """Return expected bits, those of the scales included, and error in squares of the step."""
        base = self._base(step)
        i, j = self._choose(base, detail)
        counts, at = self._counts(i, j, base)
        bits = 8 + self._rows[i][1] + self._columns[j][1]
        return bits + float(counts @ law.bits[at]), float(counts @ law.error[at])

    def _base(self, step: float) -> int:
        return int(min(max(round(self._power - 2 * math.log2(step)), -_LIMIT), _LIMIT))

    def _choose(self, base: int, law: Law | None) -> tuple[int, int]:
        """Return which details of rows and columns cost least by a law; without one the finest."""
        if law is None:
            return 0, 0

        def cost(i: int, j: int) -> float:
            counts, at = self._counts(i, j, base)
            return float(counts @ law.worth[at]) + _WORTH * (self._rows[i][1] + self._columns[j][1])

        j = min(range(len(self._columns)), key=lambda j: cost(0, j))
        return min(range(len(self._rows)), key=lambda i: cost(i, j)), j

    def _counts(self, i: int, j: int, base: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return how many coordinates are of each scale, and which place of a law that is."""
        if (i, j) not in self._pairs:
            rows, columns = self._rows[i][0], self._columns[j][0]
            rows, columns = rows[rows != DEAD], columns[columns != DEAD]
            counts, first = np.zeros(0), 0
            if rows.size and columns.size:
                # All pairs of a row and a column, counted by the sum of their indices.
                counts = np.convolve(
                    np.bincount(rows - rows.min()), np.bincount(columns - columns.min())
                ).astype(np.float64)
                first = int(rows.min() + columns.min())
            self._pairs[i, j] = counts, first
        counts, first = self._pairs[i, j]
        at = np.arange(first + base + HALF, first + base + HALF + counts.size)
        return counts, np.minimum(np.maximum(at, 0), 2 * HALF - 1)


@jit
def _squares(x, rows, columns):  # type: ignore[no-untyped-def]
    """Add the squares of a matrix by row and by column; the last row may be short."""
    width = columns.size
    for i in range(rows.size):
        total = 0.0
        for j in range(min(width, x.size - i * width)):
            square = np.float64(x[i * width + j]) ** 2
            columns[j] += square
            total += square
        rows[i] = total


def _details(ratio: NDArray[np.float64]) -> list[tuple[Index, float]]:
    """Return offsets in half octaves, rounded ever more coarsely, and about their bits."""
    with np.errstate(divide="ignore"):
        power = np.log2(ratio)
    live = np.isfinite(power)
    found = []
    for grain in (1, 2, 4, 2 * _LIMIT):
        index = np.full(power.shape, DEAD, np.int32)
        index[live] = np.clip(grain * np.rint(power[live] / grain), -_LIMIT, _LIMIT)
        counts = np.unique(index, return_counts=True)[1]
        found.append((index, float(counts @ np.log2(index.size / counts)) + 4 * counts.size))
        if counts.size == 1:
            return found
    return [*found, (np.zeros(power.shape, np.int32), 0.0)]  # zero ones are not told apart


def _scaled(size: int, width: int) -> tuple[bool, bool]:
    """Return whether a tensor's rows and columns have scales of their own."""
    rows = -(-size // width) if size else 0
    return rows > 1 and width >= _LEAST, rows >= _LEAST and width > 1


def encode(scales: Scales, layout: Layout) -> bytes:
    """Encode scales with the range coder; the length in front is the caller's."""
    values: list[Index] = []
    tensors: list[tuple[int, int]] = []
    for (size, width), rows, columns in zip(
        geometry(layout), scales.rows, scales.columns, strict=True
    ):
        if not size:
            continue
        by_row, by_column = _scaled(size, width)
        live = rows[rows != DEAD]
        middle = int(np.median(live)) if live.size else DEAD
        values.append(np.array([middle], np.int32))
        if by_row:
            values.append(np.where(rows == DEAD, DEAD, rows - middle).astype(np.int32))
        if by_column:
            values.append(columns)
        tensors += [(part.size, part.size) for part in values[len(tensors) :]]
    count = sum(size for size, _ in tensors)
    joined = _with_dead_near(np.concatenate([*values, np.zeros(0, np.int32)]))
    body = _range.encode(joined, tensors, 4 * count + 64)
    assert body is not None
    return body


def _with_dead_near(values: Index) -> Index:
    """Let 1 stand for :data:`DEAD`, and what is above 0 move up: zero columns are frequent."""
    return np.where(values == DEAD, 1, values + (values > 0)).astype(np.int32)


def _with_dead_far(values: Index) -> Index:
    """Undo :func:`_with_dead_near`."""
    return np.where(values == 1, DEAD, values - (values > 1)).astype(np.int32)


def decode(body: bytes | memoryview, layout: Layout) -> Scales:
    """Return the scales of :func:`encode`.

    Raises:
      DecodeError: If they are not what an encoder writes.
    """
    shapes = geometry(layout)
    tensors = []
    for size, width in shapes:
        if size:
            by_row, by_column = _scaled(size, width)
            rows = -(-size // width)
            tensors += [(1, 1)] + [(rows, rows)] * by_row + [(width, width)] * by_column
    values = _with_dead_far(_range.decode(body, tensors))
    if ((np.abs(values) > 2 * _LIMIT) & (values != DEAD)).any():
        raise DecodeError("a scale is out of range")
    found = Scales([], [])
    at = 0

    def take(count: int) -> Index:
        nonlocal at
        at += count
        return values[at - count : at]

    for size, width in shapes:
        row = np.full(-(-size // width), DEAD, np.int32)
        column = np.zeros(width, np.int32)
        if size:
            by_row, by_column = _scaled(size, width)
            middle = int(take(1)[0])
            offsets = take(row.size) if by_row else np.zeros(row.size, np.int32)
            if middle != DEAD:
                row = np.where(offsets == DEAD, DEAD, middle + offsets).astype(np.int32)
            column = take(width) if by_column else column
        found.rows.append(row)
        found.columns.append(column)
    return found
