"""Whole numbers as bits: Elias' omega code (Elias 1975), as QSGD writes its levels.

Bits fill bytes from the highest down, as the codes are read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.errors import DecodeError
from fedq.jit import jit

Levels = NDArray[np.int32]


@jit
def put(value, bits, buffer, at):  # type: ignore[no-untyped-def]
    """Write the low ``bits`` of a value at bit ``at``; return where the next one goes."""
    for place in range(bits - 1, -1, -1):
        if value >> place & 1:
            buffer[at >> 3] |= 128 >> (at & 7)
        at += 1
    return at


@jit
def get(bits, body, at):  # type: ignore[no-untyped-def]
    """Return ``bits`` bits as a number, and where the next one is; beyond the body are zeros."""
    value = 0
    for _ in range(bits):
        value <<= 1
        if at >> 3 < body.size:
            value |= int(body[at >> 3]) >> (7 - (at & 7)) & 1
        at += 1
    return value, at


@jit
def _bit_length(value):  # type: ignore[no-untyped-def]
    bits = 0
    while value >> bits:
        bits += 1
    return bits


@jit
def omega_bits(value):  # type: ignore[no-untyped-def]
    """Return the length of the omega code of ``value >= 1``."""
    total = 1
    while value > 1:
        bits = _bit_length(value)
        total += bits
        value = bits - 1
    return total


@jit
def _put_omega(value, buffer, at):  # type: ignore[no-untyped-def]
    """Write groups from the last to the first, then the zero that ends them."""
    at += omega_bits(value)
    end = at - 1  # buffers start as zeros
    while value > 1:
        bits = _bit_length(value)
        end -= bits
        put(value, bits, buffer, end)
        value = bits - 1
    return at


@jit
def _get_omega(body, at):  # type: ignore[no-untyped-def]
    """Return a number, 0 if it does not fit 32 bits, and where the next one is."""
    value = 1
    while True:
        more, at = get(1, body, at)
        if not more:
            return value, at
        if value > 31:
            return 0, at
        rest, at = get(value, body, at)
        value = 1 << value | rest


@jit
def _code_bits(levels, dense):  # type: ignore[no-untyped-def]
    total, last = 1, -1
    for i in range(levels.size):
        level = abs(levels[i])
        if dense:
            total += omega_bits(level + 1) + (level > 0)
        elif level > 0:
            total += omega_bits(i - last) + 1 + omega_bits(level)
            last = i
    return total if dense else total + omega_bits(levels.size - last)


@jit
def _write(levels, dense, buffer):  # type: ignore[no-untyped-def]
    at, last = put(1 if dense else 0, 1, buffer, 0), -1
    for i in range(levels.size):
        level = abs(levels[i])
        if dense:
            at = _put_omega(level + 1, buffer, at)
            if level > 0:
                at = put(1 if levels[i] < 0 else 0, 1, buffer, at)
        elif level > 0:
            at = _put_omega(i - last, buffer, at)
            at = put(1 if levels[i] < 0 else 0, 1, buffer, at)
            at = _put_omega(level, buffer, at)
            last = i
    if not dense:
        _put_omega(levels.size - last, buffer, at)


@jit
def _read(body, largest, levels):  # type: ignore[no-untyped-def]
    """Fill the levels; return whether all of them, and the runs between them, are possible."""
    dense, at = get(1, body, 0)
    i = -1
    while True:
        run = 1
        if not dense:
            run, at = _get_omega(body, at)
        if run < 1 or run > levels.size - i:
            return False
        i += run
        if i == levels.size:
            return True
        negative = 0
        if not dense:
            negative, at = get(1, body, at)
        level, at = _get_omega(body, at)
        if dense:
            level -= 1
            if level > 0:
                negative, at = get(1, body, at)
        if level < 0 or level > largest:
            return False
        levels[i] = -level if negative else level


def max_bytes(count: int, largest: int) -> int:
    """Return an upper bound on :func:`encode` for ``count`` levels up to +-``largest``."""
    return (1 + count * (int(omega_bits(largest + 1)) + 1) + 7) // 8


def encode(levels: Levels) -> bytes:
    """Encode signed levels by the shorter of QSGD's two codes; the first bit is 1 for the second.

    Sparse: per non-zero level the distance from the last one, the sign, the magnitude; in the end
    the distance to the end. Dense: per level the magnitude plus one, and the sign if it is not 0.

    >>> encode(np.array([0, 0, 0, -2, 0], np.int32)).hex()
    '8d00'
    """
    lengths = [int(_code_bits(levels, dense)) for dense in (False, True)]
    dense = lengths[True] <= lengths[False]
    buffer = np.zeros((lengths[dense] + 7) // 8, np.uint8)
    _write(levels, dense, buffer)
    return buffer.tobytes()


def decode(body: memoryview, count: int, largest: int) -> Levels:
    """Return the (count,) int32 levels of :func:`encode`, all within +-``largest``.

    Raises:
      DecodeError: If the body is not the one code of its levels.
    """
    levels = np.zeros(count, np.int32)
    possible = _read(np.array(np.frombuffer(body, np.uint8)), largest, levels)
    if not possible or encode(levels) != body:
        raise DecodeError("an Elias code is not one that an encoder writes")
    return levels
