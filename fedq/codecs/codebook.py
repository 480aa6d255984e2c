"""Learned levels: k-means in one dimension (Lloyd 1957, Han et al. 2016)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq import wire
from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import (
    Wide,
    cuts,
    floats_bytes,
    fractions,
    group_sizes,
    read_floats,
    starts,
)
from fedq.codecs._integers import Entropy
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

Book = NDArray[np.float32]


@register("codec", "codebook")
class Codebook(Codec):
    """Round to at most ``2**bits`` levels fitted to the values by k-means.

    Lloyd's iteration runs on sorted values with prefix sums: O(d log d), the same on every run.
    A group with no more distinct values than levels is exact.

    ``nearest`` minimises the squared error. ``stochastic`` moves the end levels to the minimum and
    maximum and goes to the upper of the levels l < h around ``x`` with probability
    ``(x - l) / (h - l)``, which is unbiased.

    Body: per group the number of levels less one, u8, and the levels, ascending float32; then the
    indices, range-coded (centred on the level nearest zero) or packed.

    Args:
      bits: 1 to 8 per packed index.
      scope: A codebook per ``tensor``, or one for the ``model``.
      rounding: See above.
      iterations: Of Lloyd, at most.
      entropy: ``packed`` sends exactly ``bits`` per coordinate.

    Example:
      >>> layout = Layout.flat(5)
      >>> codec = Codebook(bits=1)
      >>> codec.decode(codec.encode(np.array([0.0, 0.1, -0.1, 5.0, 7.0]), layout), layout)
      array([0., 0., 0., 6., 6.], dtype=float32)

    Reference:
      Lloyd 1982, "Least squares quantization in PCM"; Han et al. 2016, "Deep compression", 3.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"bits": 2, "rounding": "stochastic"},
        {"bits": 1, "scope": "model", "entropy": "packed"},
        {"bits": 6, "scope": "model"},
    )

    bits: int = 4
    scope: Literal["tensor", "model"] = "tensor"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    iterations: int = 30
    entropy: Entropy = "max"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"codec.bits must be from 1 to 8, not {self.bits}")
        if not 0 <= self.iterations <= 1000:
            raise ConfigError(f"codec.iterations must be from 0 to 1000, not {self.iterations}")

    @property
    def unbiased(self) -> bool:
        """Whether rounding is stochastic."""
        return self.rounding == "stochastic"

    def max_body_bytes(self, layout: Layout) -> int:
        """Full codebooks and packed indices."""
        groups = group_sizes(layout, self.scope, 0)
        books = int(np.minimum(groups, 1 << self.bits).sum())
        return groups.size + 4 * books + packed_bytes(layout.size, self.bits)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, self.scope, 0)
        parts: list[Wide] = np.split(x.astype(np.float64), np.cumsum(sizes)[:-1])
        books = [self._fit(part) for part in parts if part.size]
        codes = np.zeros(x.size, np.int32)
        u = np.full(x.size, 0.5)
        if self.unbiased:
            u = fractions(seed, x.size, "codebook")
        start = 0
        for part, book in zip(parts, books, strict=False):
            level = book.astype(np.float64)
            below = np.clip(np.searchsorted(level, part, side="right") - 1, 0, level.size - 1)
            above = np.minimum(below + 1, level.size - 1)
            # Nearest is u = 1/2; end levels take what lies beyond them.
            rise = part - level[below] > u[start : start + part.size] * (
                level[above] - level[below]
            )
            codes[start : start + part.size] = np.where(rise, above, below)
            start += part.size
        head = b"".join(bytes([book.size - 1]) + floats_bytes(book) for book in books)
        return head + _integers.encode(
            codes, layout, self.bits, entropy=self.entropy, centre=_centres(books, sizes)
        )

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, self.scope, 0)
        reader, books = wire.Reader(body), []
        for _ in sizes:
            count = reader.byte() + 1
            if count > 1 << self.bits:
                raise DecodeError(f"a codebook of {count} levels for {self.bits} bits")
            book, _ = read_floats(reader.take(4 * count), count)
            if (np.diff(book.astype(np.float64)) <= 0).any():
                raise DecodeError("the levels of a codebook do not ascend")
            books.append(book)
        centre = _centres(books, sizes)
        codes = _integers.decode(
            reader.rest(), layout, self.bits, entropy=self.entropy, centre=centre
        )
        y = np.empty(layout.size, np.float32)
        for start, size, book in zip(starts(sizes), sizes, books, strict=False):
            part = slice(start, start + size)
            if codes[part].max() >= book.size:
                raise DecodeError("an index is beyond its codebook")
            for cut in cuts(size):
                y[part][cut] = book[codes[part][cut]]
        return y

    def _fit(self, values: Wide) -> Book:
        """Return the levels of one group, strictly ascending float32."""
        values = np.sort(values)
        levels = _lloyd(values, 1 << self.bits, self.iterations)
        if self.unbiased:
            levels[0], levels[-1] = values[0], values[-1]
            if levels.size == 1 and values[0] < values[-1]:
                levels = values[[0, -1]]
        # Adding 0 turns a negative zero into zero.
        return np.unique(levels.astype(np.float32) + np.float32(0))


def _lloyd(values: Wide, count: int, iterations: int) -> Wide:
    """Return at most ``count`` levels of least squared error for sorted values."""
    distinct = values[np.flatnonzero(np.diff(values, prepend=-np.inf))]
    if distinct.size <= count:
        return distinct
    total = np.concatenate([[0.0], np.cumsum(values)])
    # Start near the best level density, (sample density)**(1/3) (Panter and Dite 1951): a gap g
    # between sample quantiles gets a share g**(3/4) of the levels, by square roots, which every
    # machine rounds alike (g**(2/3) would be exact).
    marks = values[np.linspace(0, values.size - 1, min(values.size, 64 * count)).astype(np.int64)]
    root = np.sqrt(np.diff(marks))
    share = np.concatenate([[0.0], np.cumsum(root * np.sqrt(root))])
    places = np.searchsorted(share, share[-1] * np.arange(1, count) / count)
    edges = np.concatenate([[0], np.searchsorted(values, marks[places]), [values.size]])
    levels = distinct[:0]
    for _ in range(iterations + 1):
        edges = np.unique(edges)  # empty cells vanish
        new = np.diff(total[edges]) / np.diff(edges)
        if np.array_equal(new, levels):
            break
        levels = new
        middle = (levels[1:] + levels[:-1]) / 2
        edges = np.concatenate([[0], np.searchsorted(values, middle), [values.size]])
    return levels


def _centres(books: list[Book], sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the index of the level nearest zero for every coordinate, (d,) int32."""
    nearest = [int(np.argmin(np.abs(book))) for book in books]
    return np.repeat(np.array(nearest, np.int32), sizes)
