"""Kernels of dithered trellis-coded quantization; which coordinate is sent, and how.

The 32 random bits of a coordinate are its dither u in (0, 4), the upper 23, and its lot, the lower
9. Integers are coded relative to the one that zero would most likely get; the place of zero in its
interval, which both ends know, helps the coder.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedq.codecs._range import ODD_ABOVE, ODD_BELOW, SIDE_FLIP, SKIP
from fedq.codecs._scales import HALF
from fedq.jit import jit

#: Place of a coordinate that is not sent.
ABSENT = 255
_UNIT = 2.0**-21
_BOUND = np.float32(1 << 24)
_INDICES = 2 * HALF


@cache
def places() -> NDArray[np.uint8]:
    """Return the coder's side information by parity of the state and place of u, (2, 256).

    Where zero lies close to a border of its interval, the integer beyond is nearly as likely: bins
    grow geometrically from the border, mirrored so that the likelier sign is the same.
    """
    table = np.empty((2, 256), np.uint8)
    bounds = [1, 2, 3, 4, 6, 8, 11, 14, 18, 23, 29, 36, 44, 53]
    for parity in (0, 1):
        shifted = np.arange(256) + (0 if parity else 64)
        place = shifted % 128
        bins = np.searchsorted(bounds, np.minimum(place, 127 - place), side="right")
        odd = (shifted // 128 & 1) * (ODD_BELOW | ODD_ABOVE)
        table[parity] = bins + SIDE_FLIP * (place < 64) + odd
        table[parity, ABSENT] = SKIP
    return table


@jit
def classify(words, rows, columns, size, keep, start, place, index):  # type: ignore[no-untyped-def]
    """Write place and index into the law of a tensor's coordinates; return how many are sent."""
    width = columns.size
    sent = 0
    n = start
    for r in range(rows.size):
        for c in range(min(width, start + size - n)):
            scale = rows[r] + columns[c]
            at = min(max(scale + HALF, 0), _INDICES - 1)
            word = words[n]
            if scale < -(1 << 11) or (word & np.uint32(511)) >= keep[at]:
                place[n] = ABSENT
            else:
                place[n] = min(word >> np.uint32(24), np.uint32(254))
                sent += 1
            index[n] = at
            n += 1
    return sent


@jit
def expect(x, rows, columns, lost, noise):  # type: ignore[no-untyped-def]
    """Return the sum of ``lost x^2 + noise`` over a tensor, both by index into the law."""
    total = 0.0
    n = 0
    for r in range(rows.size):
        for c in range(min(columns.size, x.size - n)):
            scale = rows[r] + columns[c]
            if scale >= -(1 << 11):
                at = min(max(scale + HALF, 0), _INDICES - 1)
                total += lost[at] * np.float64(x[n]) ** 2 + noise[at]
            n += 1
    return total


@jit
def shift(x, words, place, index, inverse, y):  # type: ignore[no-untyped-def]
    """Write ``x / step + u`` of the coordinates that are sent, in order."""
    m = 0
    for n in range(x.size):
        if place[n] != ABSENT:
            u = (np.float64(words[n] >> np.uint32(9)) + 0.5) * _UNIT
            value = np.float32(x[n] * inverse[index[n]] + u)
            y[m] = min(max(value, -_BOUND), _BOUND)
            m += 1


@jit
def to_values(levels, place, values):  # type: ignore[no-untyped-def]
    """Write what is coded: half the integer, relative to that of zero."""
    m = 0
    for n in range(place.size):
        if place[n] == ABSENT:
            values[n] = 0
        else:
            level = levels[m]
            parity = level & 1
            shifted = np.int32(place[n]) + (0 if parity else 64)
            values[n] = ((level - parity) >> 1) - (shifted >> 7)
            m += 1


@jit
def restore(values, words, place, index, steps, trellis, out):  # type: ignore[no-untyped-def]
    """Write the decoded coordinates, ``(integer - u) step``; absent ones are zero."""
    state = 0
    top = 3.4028234663852886e38
    for n in range(values.size):
        if place[n] == ABSENT:
            out[n] = np.float32(0)
        else:
            parity = state & 1
            shifted = np.int64(place[n]) + (0 if parity else 64)
            half = np.int64(values[n]) + (shifted >> 7)
            state = trellis[state, half & 1]
            u = (np.float64(words[n] >> np.uint32(9)) + 0.5) * _UNIT
            y = (np.float64(2 * half + parity) - u) * steps[index[n]]
            out[n] = np.float32(min(max(y, -top), top))
