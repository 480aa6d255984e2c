"""Randomised Hadamard rotation (Ailon and Chazelle 2006), in pieces and never padded as a whole.

A vector is cut into pieces of powers of two, 2**16 at most: the largest ones first, and what is
left below :data:`SMALLEST` coordinates is padded to the next power of two. A piece fits into a
core's cache, and longer ones would gain nothing: the rotated piece is as Gaussian, and the error of
the codecs here is in proportion to energy however it is cut.

The transform adds and subtracts in the order of the textbook's stages, without fast-math: every
schedule of the same stages, on any machine, gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq import random
from fedq.errors import ConfigError
from fedq.jit import jit
from fedq.layout import Vector

LARGEST = 1 << 16
SMALLEST = 64
_TILE = 4096  # floats of a first-level cache


def piece_sizes(count: int) -> list[int]:
    """Return powers of two, descending, that hold ``count`` coordinates.

    >>> piece_sizes(200_000), piece_sizes(100)
    ([65536, 65536, 65536, 2048, 1024, 256, 64], [64, 64])
    """
    sizes = [LARGEST] * (count // LARGEST)
    rest = count % LARGEST
    sizes += [1 << bit for bit in range(15, 5, -1) if rest >> bit & 1]
    tail = rest % SMALLEST
    return sizes + ([1 << (tail - 1).bit_length()] if tail else [])


def check_rounds(rounds: int) -> None:
    """Refuse other than one or two rounds."""
    if rounds not in (1, 2):
        raise ConfigError(f"codec.rounds must be 1 or 2, not {rounds}")


class Rotation:
    """Seeded rotation of (d,) vectors; both ends build the same one.

    A piece x of n coordinates becomes ``H D_2 H D_1 x`` (two rounds) with the Hadamard matrix H of
    entries +-1 and seeded diagonal signs D. It is left unnormalised: :meth:`gain` says by how much
    lengths grow.

    One round spreads a coordinate evenly, but of a vector with two non-zeros it makes a few
    values only: what then looks rounded at random is not (the same error from every client). Two
    rounds cure that.

    Args:
      count: d.
      rounds: 1 or 2.
      seed: Of the signs.
    """

    def __init__(self, count: int, rounds: int, seed: int) -> None:
        self.count, self.rounds = count, rounds
        self.sizes = piece_sizes(count)
        self.padded = sum(self.sizes)
        words = random.words(seed, rounds * -(-self.padded // 32), "rotation")
        #: (rounds, words): the sign of coordinate i is bit i % 32 of word i // 32.
        self.signs = words.reshape(rounds, -1)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Return the bounds of the pieces among the padded coordinates."""
        start = 0
        for size in self.sizes:
            yield start, start + size
            start += size

    def gain(self, size: int) -> float:
        """Return by how much the transform of a piece lengthens vectors: a power of sqrt(n)."""
        return float(size) if self.rounds == 2 else math.sqrt(size)

    def forward(self, x: Vector) -> tuple[Vector, list[float]]:
        """Return the rotated (padded,) float32, and what each piece was divided by before.

        The divisors are powers of two that bring the largest magnitude of a piece into [1, 2), so
        that neither tiny nor huge vectors lose digits.
        """
        z = np.zeros(self.padded, np.float32)
        z[: self.count] = x
        units = []
        for start, stop in self.pieces():
            piece = z[start:stop]
            unit = math.ldexp(0.5, math.frexp(float(np.abs(piece).max()))[1])
            units.append(unit)
            for turn in range(self.rounds):
                _flip(piece, self.signs[turn, start // 32 :], 1.0 if turn else 1.0 / unit)
                transform(piece)
        return z, units

    def backward(self, z: Vector, scales: Any) -> Vector:
        """Return (d,) float32 from rotated coordinates in units of a scale per piece; z is spent.

        The inverse of :meth:`forward` up to rounding if ``scales`` are its divisors, each over the
        gain. What exceeds float32 saturates.
        """
        for (start, stop), scale in zip(self.pieces(), scales, strict=True):
            piece, size = z[start:stop], stop - start
            for turn in reversed(range(self.rounds)):
                transform(piece)
                factor = 1.0 if turn else float(scale) / self.gain(size)
                _flip(piece, self.signs[turn, start // 32 :], factor)
        return z[: self.count]


@jit
def _flip(z: Vector, words: NDArray[np.uint32], factor: float) -> None:
    """Multiply by the signs and by ``factor`` in float64, in place; saturate."""
    top = 3.4028234663852886e38
    for i in range(z.size):
        value = min(max(z[i] * factor, -top), top)
        minus = words[i >> 5] >> np.uint32(i & 31) & np.uint32(1)
        z[i] = -value if minus else value


@jit
def _stages_of_4(z: Vector, start: int, stop: int, h: int) -> None:
    """Do the stages h and 2 h over a range: four values are read and written once for both."""
    for low in range(start, stop, 4 * h):
        for i in range(low, low + h):
            a, b, c, d = z[i], z[i + h], z[i + 2 * h], z[i + 3 * h]
            p, q, r, s = a + b, a - b, c + d, c - d
            z[i], z[i + h], z[i + 2 * h], z[i + 3 * h] = p + r, q + s, p - r, q - s


@jit
def _last_stage(z: Vector, start: int, h: int) -> None:
    for i in range(start, start + h):
        a, b = z[i], z[i + h]
        z[i], z[i + h] = a + b, a - b


@jit
def _first_16(z: Vector, start: int) -> None:
    for h in (1, 2, 4, 8):
        for low in range(start, start + 16, 2 * h):
            for i in range(low, low + h):
                a, b = z[i], z[i + h]
                z[i], z[i + h] = a + b, a - b


@jit
def transform(z: Vector) -> None:
    """Multiply (n,) float32 by the n x n Hadamard matrix of entries +-1, in place; n is 2**k.

    Tiles go through all their stages first, then the whole piece through what is left. Each stage
    of half-width h turns pairs (a, b) that lie h apart into (a + b, a - b).

    >>> z = np.array([1, 2, 3, 5], np.float32)
    >>> transform(z)
    >>> z
    array([11., -3., -5.,  1.], dtype=float32)
    """
    n = z.size
    tile = min(n, _TILE)
    for start in range(0, n, tile):
        h = 1
        if tile >= 16:
            for low in range(start, start + tile, 16):
                _first_16(z, low)
            h = 16
        while 4 * h <= tile:
            _stages_of_4(z, start, start + tile, h)
            h *= 4
        if h < tile:
            _last_stage(z, start, h)
    h = tile
    while 4 * h <= n:
        _stages_of_4(z, 0, n, h)
        h *= 4
    if h < n:
        _last_stage(z, 0, h)


def integer_factor(largest: float) -> float:
    """Return the power of two that makes a piece's numbers integers of 22 bits.

    Sums of integers are the same in any order: by any kernel, on any device.
    """
    return math.ldexp(1.0, 22 - math.frexp(largest)[1])


@jit
def energy(z: Vector, integer: float) -> int:
    """Return the sum of squares of the integers ``rint(integer z)``."""
    total = np.int64(0)
    for i in range(z.size):
        number = np.int64(np.rint(z[i] * integer))
        total += number * number
    return int(total)
