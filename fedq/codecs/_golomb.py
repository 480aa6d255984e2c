"""Positions as bits: Golomb-Rice codes of the gaps between them (Golomb 1966, Rice 1979)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.codecs._elias import get, put
from fedq.errors import DecodeError
from fedq.jit import jit

_GOLDEN = (5**0.5 - 1) / 2


def parameter(kept: int, count: int) -> int:
    """Return the best remainder bits b for ``kept`` of ``count`` positions.

    Sattler et al. 2019: ``b = 1 + floor(log2(log(phi - 1) / log(1 - p)))`` with
    ``p = kept / count`` and the golden ratio phi, or 0 if that is negative. That is how often
    ``1 - p`` can be squared before it falls below ``phi - 1``, which no logarithm has to round.

    >>> parameter(1, 100), parameter(1, 2)
    (6, 0)
    """
    rest, b = 1 - kept / max(count, 1), 0
    while rest >= _GOLDEN and kept:
        rest *= rest
        b += 1
    return b


def max_bytes(kept: int, count: int) -> int:
    """Return an upper bound on :func:`encode`."""
    b = parameter(kept, count)
    return (kept * (1 + b) + (count - kept >> b) + 7) // 8


@jit
def _write(positions, b, buffer):  # type: ignore[no-untyped-def]
    """Write quotients as ones, ended by a zero, and remainders; return the bits."""
    at, last = 0, -1
    for position in positions:
        gap = position - last - 1
        for _ in range(gap >> b):
            at = put(1, 1, buffer, at)
        at = put(gap & ((1 << b) - 1), b, buffer, at + 1)  # buffers start as zeros
        last = position
    return at


@jit
def _read(body, b, count, positions):  # type: ignore[no-untyped-def]
    """Fill the positions; return the bits read, or -1 for a position beyond the end."""
    at, last = 0, -1
    for i in range(positions.size):
        one, at = get(1, body, at)
        while one:
            last += 1 << b
            if last >= count:
                return -1
            one, at = get(1, body, at)
        rest, at = get(b, body, at)
        last += rest + 1
        if last >= count:
            return -1
        positions[i] = last
    return at


def encode(positions: NDArray[np.int64], count: int) -> bytes:
    """Encode ascending positions in [0, count).

    >>> encode(np.array([0, 1, 5]), 8).hex()
    '0a'
    """
    buffer = np.zeros(max_bytes(positions.size, count), np.uint8)
    bits = _write(positions, parameter(positions.size, count), buffer)
    return buffer[: (bits + 7) // 8].tobytes()


def decode(body: memoryview, kept: int, count: int) -> NDArray[np.int64]:
    """Return the (kept,) int64 positions of :func:`encode`.

    Raises:
      DecodeError: If the body is not the one code of its positions.
    """
    positions = np.zeros(kept, np.int64)
    octets = np.array(np.frombuffer(body, np.uint8))
    bits = _read(octets, parameter(kept, count), count, positions)
    if bits < 0 or len(body) != (bits + 7) // 8 or (bits % 8 and octets[-1] & 255 >> bits % 8):
        raise DecodeError("positions are not coded as an encoder does")
    return positions
