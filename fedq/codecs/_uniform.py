"""Rounding to evenly spaced levels and back, in one pass over the vector.

Each function has a kernel and a NumPy form. Both do the same IEEE operations on float64 in the same
order, so that they agree to the bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.codecs._groups import Wide, to_float32
from fedq.errors import DecodeError
from fedq.jit import COMPILED, jit
from fedq.layout import Vector

Codes = NDArray[np.int32]
_LARGEST = float(np.finfo(np.float32).max)
_FRACTION = 2.0**-32  # of a random word


def quantize(
    x: Vector,
    words: NDArray[np.uint32] | None,
    sizes: NDArray[np.int64],
    offset: Wide,
    step: Wide,
    zero: int,
    top: int,
) -> Codes:
    """Return the codes of ``x``, (d,) in [0, top]: ``t = (x - offset) / step + zero``, rounded.

    Args:
      x: (d,) finite.
      words: (d,) random, for ``floor(t + u)``; None for the nearest integer.
      sizes: (groups,) adds up to d.
      offset: (groups,)
      step: (groups,) not negative; where it is zero, ``x`` equals ``offset``.
      zero: Code of ``offset``.
      top: Largest code.
    """
    divisor = np.where(step > 0, step, 1.0)
    if COMPILED:
        codes = np.empty(x.size, np.int32)
        random = np.zeros(0, np.uint32) if words is None else words
        _quantize(x, random, sizes, offset, divisor, zero, top, codes)
        return codes
    t = (x - np.repeat(offset, sizes)) / np.repeat(divisor, sizes) + zero
    code = np.rint(t) if words is None else np.floor(t + (words + 0.5) * _FRACTION)
    return np.asarray(np.clip(code, 0, top), np.int32)


def dequantize(
    codes: Codes,
    words: NDArray[np.uint32] | None,
    sizes: NDArray[np.int64],
    offset: Wide,
    step: Wide,
    zero: int,
    top: int,
) -> Vector:
    """Return ``(code - zero) step + offset``, or ``(code - zero - u + 1/2) step + offset``.

    Raises:
      DecodeError: If a code exceeds ``top``, or is not ``zero`` where the step is.
    """
    if COMPILED:
        y = np.empty(codes.size, np.float32)
        random = np.zeros(0, np.uint32) if words is None else words
        valid = _dequantize(codes, random, sizes, offset, step, zero, top, y)
    else:
        wide = np.repeat(step, sizes)
        level = codes - float(zero)
        if words is not None:
            level += 0.5 - (words + 0.5) * _FRACTION
        y = to_float32(level * wide + np.repeat(offset, sizes))
        valid = not (codes > top).any() and not (codes[wide == 0] != zero).any()
    if not valid:
        raise DecodeError("a code is out of range")
    return y


@jit(allocates=False)
def _quantize(x, words, sizes, offset, divisor, zero, top, codes):  # type: ignore[no-untyped-def]
    start = 0
    for group in range(sizes.size):
        o, s, end = offset[group], divisor[group], start + sizes[group]
        if words.size:
            for i in range(start, end):
                t = (np.float64(x[i]) - o) / s + zero
                t = np.floor(t + (np.float64(words[i]) + 0.5) * _FRACTION)
                codes[i] = np.int32(min(max(t, 0.0), float(top)))
        else:
            for i in range(start, end):
                t = np.rint((np.float64(x[i]) - o) / s + zero)
                codes[i] = np.int32(min(max(t, 0.0), float(top)))
        start = end


@jit(allocates=False)
def _dequantize(codes, words, sizes, offset, step, zero, top, y):  # type: ignore[no-untyped-def]
    """Fill ``y``; return whether all codes are in range."""
    start, wrong = 0, 0
    for group in range(sizes.size):
        o, s, end = offset[group], step[group], start + sizes[group]
        low, high = (0, top) if s > 0 else (zero, zero)
        for i in range(start, end):
            wrong += 1 if codes[i] < low or codes[i] > high else 0
        if words.size:
            for i in range(start, end):
                level = np.float64(codes[i]) - zero
                level += 0.5 - (np.float64(words[i]) + 0.5) * _FRACTION
                y[i] = np.float32(min(max(level * s + o, -_LARGEST), _LARGEST))
        else:
            for i in range(start, end):
                level = np.float64(codes[i]) - zero
                y[i] = np.float32(min(max(level * s + o, -_LARGEST), _LARGEST))
        start = end
    return wrong == 0
