"""Integers modulo 2**k as machine words: packed for the wire, and masked by keystreams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedq.codecs import _bits
from fedq.errors import DecodeError

KEY_BYTES = 16
_BLOCK_BYTES = 1 << 18  # of a keystream: it stays in the second-level cache
_LIMB = 16

Words = list[NDArray[Any]]


@dataclass(frozen=True)
class Segment:
    """``size`` integers modulo ``2**bits``, 1 <= bits <= 64."""

    size: int
    bits: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest little-endian word of at least ``bits`` bits."""
        return np.dtype(f"<u{next(n for n in (1, 2, 4, 8) if 8 * n >= self.bits)}")

    @property
    def packed_bytes(self) -> int:
        """Bytes on the wire."""
        return sum(_bits.packed_bytes(self.size, bits) for _, bits in self._limbs())

    def _limbs(self) -> list[tuple[int, int]]:
        return [(shift, min(_LIMB, self.bits - shift)) for shift in range(0, self.bits, _LIMB)]


def zeros(segments: Sequence[Segment]) -> Words:
    """Return a zero of each segment."""
    return [np.zeros(segment.size, segment.dtype) for segment in segments]


def wrap(values: Sequence[NDArray[np.int64]], segments: Sequence[Segment]) -> Words:
    """Return integers modulo the size of their words."""
    return [v.astype(s.dtype) for v, s in zip(values, segments, strict=True)]


def centred(words: Words, segments: Sequence[Segment]) -> list[NDArray[np.int64]]:
    """Return words modulo ``2**bits`` as integers in ``[-2**(bits-1), 2**(bits-1))``."""
    # To the top of 64 bits and back: the shift down brings copies of the sign.
    return [
        (w.astype(np.uint64) << np.uint64(64 - s.bits)).view(np.int64) >> np.int64(64 - s.bits)
        for w, s in zip(words, segments, strict=True)
    ]


def pack(words: Words, segments: Sequence[Segment]) -> bytes:
    """Return words modulo ``2**bits``, each in exactly so many bits.

    Integers of more than 16 bits are packed 16 bits at a time, the lowest ones of all first.
    """
    pieces = []
    for array, segment in zip(words, segments, strict=True):
        for shift, bits in segment._limbs():
            limb: NDArray[Any] = (array >> shift if shift else array) & ((1 << bits) - 1)
            pieces.append(_bits.pack(limb.astype(np.uint16, copy=False), bits))
    return b"".join(pieces)


def unpack(body: bytes | memoryview, segments: Sequence[Segment]) -> Words:
    """Return the words of a packed body; the inverse of :func:`pack`.

    Raises:
      DecodeError: If the length is another, or a padding bit is set.
    """
    expected = sum(segment.packed_bytes for segment in segments)
    if len(body) != expected:
        raise DecodeError(f"{len(body)} bytes of masked integers where {expected} were asked for")
    words, at = [], 0
    for segment in segments:
        array = np.zeros(segment.size, segment.dtype)
        for shift, bits in segment._limbs():
            size = _bits.packed_bytes(segment.size, bits)
            limb = _bits.unpack(body[at : at + size], segment.size, bits).astype(segment.dtype)
            array |= limb << shift if shift else limb
            at += size
        words.append(array)
    return words


def add_keystreams(words: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add and subtract the AES-128-CTR keystreams of keys that are used once, in place.

    All keystreams of a block are applied while it is in the cache.

    Args:
      words: A keystream goes through all of them in turn.
      plus: Keys of 16 bytes whose keystreams are added.
      minus: Keys whose keystreams are subtracted.
    """
    signed = [(key, np.add) for key in plus] + [(key, np.subtract) for key in minus]
    streams = [
        (Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor(), apply)
        for key, apply in signed
    ]
    zero = bytes(_BLOCK_BYTES)
    buffer = bytearray(_BLOCK_BYTES + KEY_BYTES)  # a block more, as update_into wants
    for array in words:
        step = _BLOCK_BYTES // array.itemsize
        for start in range(0, array.size, step):
            block = array[start : start + step]
            stream = np.frombuffer(buffer, array.dtype, block.size)
            data = memoryview(zero)[: block.nbytes]
            for encryptor, apply in streams:
                encryptor.update_into(data, buffer)
                apply(block, stream, out=block)
