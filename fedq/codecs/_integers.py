"""Codes of n bits on the wire: entropy-coded, or packed where that is shorter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.codecs import _entropy
from fedq.codecs._bits import pack, packed_bytes, unpack
from fedq.errors import DecodeError
from fedq.layout import Layout

Codes = NDArray[np.int32]
Entropy = _entropy.Profile


def encode(
    codes: Codes,
    layout: Layout,
    bits: int,
    *,
    entropy: Entropy = "max",
    centre: int | Codes = 0,
    side: NDArray[np.uint8] | None = None,
) -> bytes:
    """Encode codes in at most ``packed_bytes(layout.size, bits)`` bytes.

    An entropy code is always shorter than that, packed codes never are: the length tells which.

    Args:
      codes: (d,) int32 in [0, 2**bits).
      layout: Gives the coder rows and columns.
      bits: Per packed code.
      entropy: ``max`` takes the range coder if it is shorter than packing; ``packed`` never does.
      centre: Most likely code, a number or (d,); the coder sees ``codes - centre``.
      side: See :func:`fedq.codecs._range.encode`.
    """
    limit = packed_bytes(layout.size, bits) - 1
    if limit > 0:
        body = _entropy.encode(codes - centre, _tensors(layout), limit, side, profile=entropy)
        if body is not None:
            return body
    return pack(codes, bits)


def decode(
    body: memoryview,
    layout: Layout,
    bits: int,
    *,
    entropy: Entropy = "max",
    centre: int | Codes = 0,
    side: NDArray[np.uint8] | None = None,
) -> Codes:
    """Return the codes of :func:`encode`, (d,) int32, all in [0, 2**bits).

    Raises:
      DecodeError: On a wrong length, a corrupt entropy code or a code out of range.
    """
    size = packed_bytes(layout.size, bits)
    if entropy == "packed" or len(body) >= size:
        return unpack(body, layout.size, bits)
    codes: Codes = _entropy.decode(body, _tensors(layout), side, profile=entropy)
    codes += np.asarray(centre, np.int32)
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise DecodeError("a code is out of range")
    return codes


def _tensors(layout: Layout) -> list[tuple[int, int]]:
    return [(tensor.size, tensor.size // max(tensor.rows, 1)) for tensor in layout]
