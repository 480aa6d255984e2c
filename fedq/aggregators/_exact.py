"""Kernels of the exact weighted sum: 128-bit fixed point in two words per coordinate.

A float32 is an integer of at most 24 bits times a power of two, so its product with a 30-bit weight
is an integer of at most 54 bits, and adding it to a fixed-point number is a shift and an addition
with carry. Integers add associatively, so the sum has no order. Nothing here rounds by the
processor's floating-point mode: x86 and ARM agree to the bit.

The accumulated integer is ``high * 2**64 + low``, in units of ``2**-FRACTION_BITS`` times the unit
of the weight. With |x| < 2**15, weights below 2**30 and 2**20 additions it stays below 2**126.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.jit import jit

FRACTION_BITS = 61
RANGE_BITS = 15
_BIAS = 127 + 23  # a float32 is its 24-bit significand times 2**(exponent field - 150)
_BEYOND = 127 + RANGE_BITS  # the exponent field of 2**RANGE_BITS; infinity and NaN have 255


@jit
def in_range(bits: NDArray[np.int32]) -> bool:
    """Whether all float32 values, given as their (d,) int32 bits, lie inside +-2**RANGE_BITS."""
    largest = np.int32(0)
    for j in range(bits.size):
        largest = max(largest, bits[j] & np.int32(0x7FFFFFFF))
    return bool((largest >> 23) < _BEYOND)


@jit
def add(
    high: NDArray[np.int64], low: NDArray[np.uint64], bits: NDArray[np.int32], weight: int
) -> None:
    """Add ``weight * x`` to the (d,) sums, x given as its int32 bits."""
    for j in range(bits.size):
        b = np.int64(bits[j])
        exponent = (b >> 23) & 0xFF
        significand = b & 0x7FFFFF
        if exponent > 0:
            significand |= 0x800000
        shift = max(exponent, np.int64(1)) - (_BIAS - FRACTION_BITS)
        drop = min(max(-shift, np.int64(0)), np.int64(31))  # below the last place: round
        significand = (significand + ((np.int64(1) << drop) >> 1)) >> drop
        shift = max(shift, np.int64(0))
        product = significand * weight
        if b < 0:
            product = -product
        old = low[j]
        new = old + (np.uint64(product) << np.uint64(shift))
        low[j] = new
        high[j] += ((product >> (np.int64(63) - shift)) >> 1) + np.int64(new < old)


@jit
def merge(
    high: NDArray[np.int64],
    low: NDArray[np.uint64],
    other_high: NDArray[np.int64],
    other_low: NDArray[np.uint64],
) -> None:
    """Add other (d,) sums to these."""
    for j in range(high.size):
        old = low[j]
        new = old + other_low[j]
        low[j] = new
        high[j] += other_high[j] + np.int64(new < old)


@jit
def divide(
    high: NDArray[np.int64], low: NDArray[np.uint64], total: int, out: NDArray[np.float32]
) -> None:
    """Write the sums divided by the total weight to ``out``, (d,)."""
    for j in range(high.size):
        h, m = high[j], low[j]
        negative = h < 0
        if negative:  # by magnitude: no cancellation between the words
            m = ~m + np.uint64(1)
            h = ~h + np.int64(m == 0)
        value = (np.float64(h) * 2.0**64 + np.float64(m)) / np.float64(total)
        value *= 2.0**-FRACTION_BITS
        out[j] = -value if negative else value
