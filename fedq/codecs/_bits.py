"""Packed n-bit codes, little-endian: code i takes bits n i ... n i + n - 1 of the body."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.errors import DecodeError
from fedq.jit import COMPILED, jit


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of ``count`` codes.

    >>> packed_bytes(10, 3)
    4
    """
    return (count * bits + 7) // 8


def pack(codes: NDArray[np.int32] | NDArray[np.uint16], bits: int) -> bytes:
    """Pack codes (n,) in [0, 2**bits), bits from 1 to 16.

    >>> pack(np.array([1, 2, 3], np.int32), 4).hex()
    '2103'
    """
    if bits in (8, 16):
        return codes.astype(f"<u{bits // 8}").tobytes()
    if not COMPILED:
        octets = codes.astype("<u2").view(np.uint8).reshape(-1, 2)
        return np.packbits(_bits(octets)[:, :bits], bitorder="little").tobytes()
    words = np.empty(codes.size * bits // 64 + 1, np.uint64)
    _fill(codes, bits, words)
    return (
        words.astype("<u8", copy=False).view(np.uint8)[: packed_bytes(codes.size, bits)].tobytes()
    )


def unpack(body: bytes | memoryview, count: int, bits: int) -> NDArray[np.int32]:
    """Return ``count`` codes as (count,) int32; the inverse of :func:`pack`.

    Raises:
      DecodeError: If the length is wrong, or a bit of the last byte's padding is set.
    """
    size = packed_bytes(count, bits)
    if len(body) != size:
        raise DecodeError(f"{len(body)} bytes for {count} codes of {bits} bits")
    padding = 8 * size - count * bits
    if padding and body[-1] >> (8 - padding):
        raise DecodeError("padding bits of packed codes are set")
    if bits in (8, 16):
        return np.frombuffer(body, f"<u{bits // 8}").astype(np.int32)
    if not COMPILED:
        loose = np.unpackbits(np.frombuffer(body, np.uint8), count=count * bits, bitorder="little")
        wide = np.zeros((count, 16), np.uint8)
        wide[:, :bits] = loose.reshape(count, bits)
        octets = np.packbits(wide, axis=1, bitorder="little")
        return octets.view("<u2").reshape(count).astype(np.int32)
    words = np.zeros(count * bits // 64 + 2, "<u8")
    words.view(np.uint8)[:size] = np.frombuffer(body, np.uint8)
    codes = np.empty(count, np.int32)
    _read(words.astype(np.uint64, copy=False), bits, codes)
    return codes


def _bits(octets: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.unpackbits(octets, axis=1, bitorder="little")


@jit(allocates=False)
def _fill(codes, bits, words):  # type: ignore[no-untyped-def]
    """Pack into words of 64 bits, the last one filled up with zeros."""
    word, filled, at = np.uint64(0), 0, 0
    for i in range(codes.size):
        code = np.uint64(codes[i])
        word |= code << np.uint64(filled)
        filled += bits
        if filled >= 64:
            words[at] = word
            at += 1
            filled -= 64
            word = code >> np.uint64(bits - filled)
    words[at] = word


@jit(allocates=False)
def _read(words, bits, codes):  # type: ignore[no-untyped-def]
    """Unpack from words of 64 bits; one more than needed may be read."""
    mask = np.uint64((1 << bits) - 1)
    for i in range(codes.size):
        place = i * bits
        at, shift = place >> 6, np.uint64(place & 63)
        word = words[at] >> shift
        if shift + np.uint64(bits) > np.uint64(64):
            word |= words[at + 1] << (np.uint64(64) - shift)
        codes[i] = np.int32(word & mask)
