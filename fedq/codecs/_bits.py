"""Packed n-bit codes, little-endian: code i takes bits n i ... n i + n - 1 of the body."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.errors import DecodeError


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of ``count`` codes.

    >>> packed_bytes(10, 3)
    4
    """
    return (count * bits + 7) // 8


def pack(codes: NDArray[np.int32], bits: int) -> bytes:
    """Pack codes (n,) in [0, 2**bits), bits from 1 to 16.

    >>> pack(np.array([1, 2, 3], np.int32), 4).hex()
    '2103'
    """
    octets = codes.astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(_bits(octets)[:, :bits], bitorder="little").tobytes()


def unpack(body: bytes | memoryview, count: int, bits: int) -> NDArray[np.int32]:
    """Return ``count`` codes as (count,) int32; the inverse of :func:`pack`.

    Raises:
      DecodeError: If the length is wrong, or a bit of the last byte's padding is set.
    """
    if len(body) != packed_bytes(count, bits):
        raise DecodeError(f"{len(body)} bytes for {count} codes of {bits} bits")
    loose = np.unpackbits(np.frombuffer(body, np.uint8), bitorder="little")
    if loose[count * bits :].any():
        raise DecodeError("padding bits of packed codes are set")
    wide = np.zeros((count, 16), np.uint8)
    wide[:, :bits] = loose[: count * bits].reshape(count, bits)
    octets = np.packbits(wide, axis=1, bitorder="little")
    return octets.view("<u2").reshape(count).astype(np.int32)


def _bits(octets: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.unpackbits(octets, axis=1, bitorder="little")
