"""Fast coder of signed integers: range asymmetric numeral systems (Duda 2013), adaptive tables.

Each integer is one symbol of 15 (0, 1, -1, ... 6, -6, above, below); what the symbol leaves open
follows as raw bits. Where magnitudes run high, integers are first cut into cells of ``2**k``, so
that the symbols fit any scale, and the ``k`` low bits, nearly uniform, are raw. The frequencies of
a symbol are the mean of two adaptive tables, picked by what both ends know already: one by the
running magnitudes of the column above and of the row to the left; one by their mean, the signs of
the two neighbours and the caller's side information. Tables are counts that halve from time to
time, and are summed anew only every few uses ("deferred summation", Moffat 1999), so that learning
costs little and no table is ever sent. Where the row has gone quiet, one symbol says whether the
next 32 integers are all zero.

The coder's state has 63 bits and moves in words of 32. As the next table depends on the last
symbol, a second, interleaved state would wait for the first. The decoder undoes the encoder's steps
in reverse, so the encoder first lists its steps (:func:`_run`, which codes both
ways) and then takes them from the last to the first (:func:`_emit`).

Every sequence of integers has exactly one code. The state starts at zero, where a decoder must end
with all words read; steps can be undone in one way only; and what an encoder would have said
otherwise (a run of zeros, a short escape) is refused. Integers only, no floating-point number.

Body, big-endian: the last state in the fewest bytes that leave a whole number of words, then words.
An empty body is a code too: all zeros, if there are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.codecs._range import MAX_MAGNITUDE, SIDE_BINS, SIDE_FLIP
from fedq.errors import DecodeError
from fedq.jit import jit

Integers = NDArray[np.int32]

_RUN = 32  # integers that one symbol can declare zero
_QUIET = 10  # running magnitude (8 fractional bits) up to which a run is likely

_CELLS = 6  # on each side of zero that have a symbol of their own
_ABOVE, _BELOW = 2 * _CELLS + 1, 2 * _CELLS + 2
_SYMBOLS = 2 * _CELLS + 3
_LONG = _SYMBOLS - 1  # prefix of an escape whose length is not given ...
_LONG_BITS = 26  # ... but that has this many bits

_BOUNDS = (3, 10, 24, 48, 88, 150, 240, 400, 700, 1000)  # of the classes of a running magnitude
_LOUD = 700  # running magnitude from which cells are widened
_CLASSES = len(_BOUNDS) + 1
_PLACES = 9 * SIDE_BINS // 4  # signs of two neighbours, quarter of the side bins
# Rows of the tables; the first two kinds come twice, for cells of one and of more integers.
_MAGNITUDE = 0
_PLACE = _MAGNITUDE + 2 * _CLASSES * _CLASSES
_ZEROS = _PLACE + 2 * _CLASSES * _PLACES
_PREFIX = _ZEROS + 2 * 16
_ROWS = _PREFIX + 2

_TABLE_BITS = 15
_DUE = _SYMBOLS  # column of ``count``: uses left until the row is summed again
_STEP = 64  # what one use adds to a count, so that rare symbols can be very rare
_MEMORY = 100 * _STEP  # sum from which counts are halved
_PATIENCE = 12  # uses between two sums, at most
_PRIOR = (32, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1, 1, 1, 1, 1)

_LOW_STATE = 1 << 31  # below it, the decoder takes a word
_WORD = (1 << 32) - 1
_HEAD_BITS = 24


@jit(allocates=False)
def _sum(row, lower, count):  # type: ignore[no-untyped-def]
    """Turn the counts of a row into lower bounds, in units of 2**-_TABLE_BITS."""
    total = 0
    for symbol in range(_SYMBOLS):
        total += int(count[row, symbol])
    scale = (1 << 30) // total
    below = 0
    for symbol in range(_SYMBOLS):
        lower[row, symbol] = (below * scale) >> (30 - _TABLE_BITS)
        below += int(count[row, symbol])
    if total > _MEMORY:
        for symbol in range(_SYMBOLS):
            count[row, symbol] = (count[row, symbol] + 1) >> 1
    count[row, _DUE] = min(1 + total // (8 * _STEP), _PATIENCE)


@jit(allocates=False)
def _learn(row, symbol, lower, count):  # type: ignore[no-untyped-def]
    count[row, symbol] += _STEP
    count[row, _DUE] -= 1
    if count[row, _DUE] == 0:
        _sum(row, lower, count)


@jit(allocates=False)
def _symbol(symbol, first, second, lower, count, stream, at, end, x, decoding):  # type: ignore[no-untyped-def]
    """Code one symbol by the mean of two rows; return it, and the coder's place and state."""
    slot = x & ((2 << _TABLE_BITS) - 1)
    if decoding:
        symbol = 0
        while lower[first, symbol + 1] + lower[second, symbol + 1] <= slot:
            symbol += 1
    low = int(lower[first, symbol]) + int(lower[second, symbol])
    frequency = int(lower[first, symbol + 1]) + int(lower[second, symbol + 1]) - low
    if decoding:
        x = frequency * (x >> (_TABLE_BITS + 1)) + slot - low
        if x < _LOW_STATE and at < end:
            x = x << 32 | stream[at]
            at += 1
    else:
        stream[at] = (_TABLE_BITS + 1) << 52 | frequency << 32 | low
        at += 1
    _learn(first, symbol, lower, count)
    _learn(second, symbol, lower, count)
    return symbol, at, x


@jit(allocates=False)
def _raw(number, bits, stream, at, end, x, decoding):  # type: ignore[no-untyped-def]
    """Code a number of up to 31 bits, all equally likely."""
    if decoding:
        number = x & ((1 << bits) - 1)
        x >>= bits
        if x < _LOW_STATE and at < end:
            x = x << 32 | stream[at]
            at += 1
    else:
        stream[at] = bits << 52 | 1 << 32 | number
        at += 1
    return number, at, x


@jit(allocates=False)
def _run(values, side, sizes, columns, above, tables, stream, end, x, decoding):  # type: ignore[no-untyped-def]
    """Code all tensors; return the coder's place (-1: no encoder writes this) and state.

    ``stream`` has the encoder's steps (bits << 52 | frequency << 32 | low), or the decoder's words.
    """
    lower, count, classes = tables
    at, n = 0, 0
    fast, slow = 0, 0  # running magnitudes to the left; all have 8 fractional bits
    for t in range(sizes.size):
        width, size = columns[t], sizes[t]
        for column in range(min(width, size)):
            above[column] = 0  # running magnitudes of the columns
        i, j = 0, 0
        unproven = 0  # integers left of a run that is said not to be all zeros, and was so far
        while i < size:
            left_size = (fast + slow) >> 1
            if i % _RUN == 0 and i + _RUN <= size and left_size <= _QUIET:
                some, total, column = 0, 0, j
                for ahead in range(_RUN):
                    total += above[column]
                    column = column + 1 if column + 1 < width else 0
                    if not decoding and values[n + ahead] != 0:
                        some = 1
                volume = 0
                while volume < 15 and total >> (volume + 2) > 0:
                    volume += 1
                row = _ZEROS + 16 * classes[left_size] + volume
                some, at, x = _symbol(some, row, row, lower, count, stream, at, end, x, decoding)
                if some > 1:
                    return -1, x
                if some == 0:
                    for ahead in range(_RUN):
                        above[j] += -above[j] >> 3
                        fast += -fast >> 3
                        slow += -slow >> 5
                        j = j + 1 if j + 1 < width else 0
                        if decoding:
                            values[n + ahead] = 0
                    i += _RUN
                    n += _RUN
                    continue
                unproven = _RUN

            up_size = above[j] if i >= width else left_size
            k = 0
            while (up_size + left_size) >> (k + 1) > _LOUD:
                k += 1
            up, left = classes[up_size >> k], classes[left_size >> k]
            first = up * _CLASSES + left
            bin_, flip = 0, 1
            if side.size:
                known = int(side[n])
                bin_ = (known & (SIDE_BINS - 1)) >> 2
                flip = -1 if known & SIDE_FLIP else 1
            signs = 4
            if j > 0:
                signs += (
                    3 * flip * ((1 if values[n - 1] > 0 else 0) - (1 if values[n - 1] < 0 else 0))
                )
            if i >= width:
                over = values[n - width]
                signs += flip * ((1 if over > 0 else 0) - (1 if over < 0 else 0))
            second = ((up + left + 1) >> 1) * _PLACES + signs * (SIDE_BINS // 4) + bin_
            wide = 1 if k > 0 else 0
            first += _MAGNITUDE + wide * _CLASSES * _CLASSES
            second += _PLACE + wide * _CLASSES * _PLACES

            v, cell, symbol = 0, 0, 0
            if not decoding:
                v = int(values[n]) * flip
                cell = v >> k
                symbol = min(2 * cell - 1, _ABOVE) if cell > 0 else min(-2 * cell, _BELOW)
            symbol, at, x = _symbol(
                symbol, first, second, lower, count, stream, at, end, x, decoding
            )
            if symbol < _ABOVE:
                v = cell = (symbol + 1) >> 1 if symbol & 1 else -(symbol >> 1)
                if k > 0:
                    low = 0 if decoding else (int(values[n]) * flip) & ((1 << k) - 1)
                    low, at, x = _raw(low, k, stream, at, end, x, decoding)
                    v = cell << k | low
            else:
                edge = (_CELLS + (1 if symbol == _ABOVE else 0)) << k
                excess = 0 if decoding else (v if symbol == _ABOVE else ~v) - edge + (1 << k)
                prefix = 0
                while prefix < _LONG and excess >> (k + prefix + 1) > 0:
                    prefix += 1
                row = _PREFIX + wide
                prefix, at, x = _symbol(
                    prefix, row, row, lower, count, stream, at, end, x, decoding
                )
                bits = _LONG_BITS if prefix == _LONG else prefix + k
                top = 0 if prefix == _LONG else 1 << bits
                raw, at, x = _raw(excess - top, bits, stream, at, end, x, decoding)
                excess = raw + top
                if prefix == _LONG and excess >> (k + _LONG) == 0:
                    return -1, x
                v = excess - (1 << k) + edge
                v = v if symbol == _ABOVE else ~v
            if abs(v) > MAX_MAGNITUDE:
                return -1, x
            if decoding:
                values[n] = v * flip
            if v != 0:
                unproven = 0
            elif unproven > 0:
                unproven -= 1
                if unproven == 0:
                    return -1, x

            magnitude = abs(v) << 8
            if i >= width:
                above[j] += (magnitude - above[j]) >> 3
            else:
                above[j] = (magnitude + fast + slow) // 3
            fast += (magnitude - fast) >> 3
            slow += (magnitude - slow) >> 5
            i += 1
            n += 1
            j = j + 1 if j + 1 < width else 0
    return at, x


@jit(allocates=False)
def _emit(steps, count, words):  # type: ignore[no-untyped-def]
    """Take the steps from last to first; return the state and where its words start, or -1."""
    x, at = 0, words.size
    for i in range(count - 1, -1, -1):
        step = int(steps[i])
        bits, frequency, low = step >> 52, (step >> 32) & 0xFFFFF, step & _WORD
        if x >> (63 - bits) >= frequency:
            if at == 0:
                return x, -1
            at -= 1
            words[at] = x & _WORD
            x >>= 32
        quotient = x // frequency
        x = (quotient << bits) + x - quotient * frequency + low
    while x >> _HEAD_BITS > 0:
        if at == 0:
            return x, -1
        at -= 1
        words[at] = x & _WORD
        x >>= 32
    return x, at


@cache
def _classes() -> NDArray[np.int64]:
    return np.searchsorted(_BOUNDS, np.arange(2 * _LOUD + 2)).astype(np.int64)


def _tables() -> tuple[NDArray[Any], ...]:
    count = np.tile(np.array((*_PRIOR, 1), np.int32), (_ROWS, 1))
    first = np.cumsum((0, *_PRIOR)) * (1 << _TABLE_BITS) // sum(_PRIOR)
    return np.tile(first.astype(np.int32), (_ROWS, 1)), count, _classes()


def _geometry(tensors: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], ...]:
    sizes = np.array([size for size, _ in tensors], np.int64)
    columns = np.array([max(width, 1) for _, width in tensors], np.int64)
    return sizes, columns, np.zeros(int(np.minimum(sizes, columns).max(initial=1)), np.int64)


def _writeable(side: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """Return the one kind of array that the kernels are compiled for."""
    return np.require(np.zeros(0) if side is None else side, np.uint8, ["C", "W"])


def encode(
    values: Integers,
    tensors: Sequence[tuple[int, int]],
    limit: int,
    side: NDArray[np.uint8] | None = None,
) -> bytes | None:
    """Code integers, or return None if that takes more than ``limit`` bytes.

    Args:
      values: (n,) int32, magnitudes up to ``_range.MAX_MAGNITUDE``.
      tensors: Size and columns of each tensor in turn; the sizes add up to n.
      limit: Bytes at most.
      side: (n,) what both ends know, as for :func:`fedq.codecs._range.encode`.

    Example:
      >>> len(encode(np.zeros(10_000, np.int32), [(10_000, 100)], limit=100))
      0
    """
    values = np.require(values, np.int32, ["C", "W"])
    steps = np.empty(3 * values.size + values.size // _RUN, np.int64)  # touched as far as used
    count, _ = _run(values, _writeable(side), *_geometry(tensors), _tables(), steps, 0, 0, False)
    words = np.empty(min(limit // 4, steps.size) + 2, np.int64)
    x, at = _emit(steps, count, words)
    if at < 0:
        return None
    head = int(x).to_bytes((int(x).bit_length() + 7) // 8, "big")
    body = head + words[at:].astype(">u4").tobytes()
    return body if len(body) <= limit else None


def decode(
    body: bytes | memoryview,
    tensors: Sequence[tuple[int, int]],
    side: NDArray[np.uint8] | None = None,
) -> Integers:
    """Decode the integers of :func:`encode`, (n,) int32.

    Raises:
      DecodeError: If the body is not the one code of its integers: too short, too long, altered.
    """
    if len(body) and body[0] == 0:
        raise DecodeError("rANS code starts with a zero byte")
    head = len(body) % 4
    x, at = int.from_bytes(body[:head], "big"), 0
    words = np.frombuffer(body[head:], ">u4").astype(np.int64)
    while x < _LOW_STATE and at < words.size:
        x = x << 32 | int(words[at])
        at += 1
    words = words[at:]
    sizes, columns, above = _geometry(tensors)
    values = np.empty(int(sizes.sum()), np.int32)
    known = _writeable(side)
    at, x = _run(values, known, sizes, columns, above, _tables(), words, words.size, x, True)
    if at < words.size or x != 0:  # at is -1 where the decoder gave up
        raise DecodeError("rANS code is corrupt: it does not end as an encoder ends it")
    return values
