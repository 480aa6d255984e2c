"""Weights of few bits, packed for transport and storage; :func:`fedq.export.runner.unpack` undoes.

No runtime computes with 4- or 2-bit weights in convolutions: they are int8 on the device, and its
latency is that of int8.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedq.export._graph import Weights
from fedq.export.runner import MAGIC


def pack(content: bytes, layers: Sequence[tuple[Weights, NDArray[np.int8]]]) -> bytes | None:
    """Return a file with its weights of fewer than 8 bits packed, None if it holds none.

    Args:
      content: The file.
      layers: Weights and how the file holds their values.
    """
    regions = []
    for weights, stored in layers:
        values = np.ascontiguousarray(stored)
        levels, rest = np.divmod(values.astype(np.int16), weights.spread)
        offset = content.find(values.tobytes())
        if weights.bits < 8 and not rest.any() and offset >= 0:  # one that was rounded stays
            regions.append((offset, values.size, weights.bits, weights.spread, levels))
    if not regions:
        return None
    regions.sort(key=lambda region: region[0])
    head, packed, kept, at = b"", b"", b"", 0
    for offset, count, bits, spread, levels in regions:
        if offset < at:  # two layers of equal weights: one of them is enough to find
            continue
        head += offset.to_bytes(4, "little") + count.to_bytes(4, "little") + bytes([bits, spread])
        digits = levels.reshape(-1, 1) >> np.arange(bits)[::-1] & 1
        packed += np.packbits(digits.astype(np.uint8)).tobytes()
        kept += content[at:offset]
        at = offset + count
    regions_written = len(head) // 10
    body = regions_written.to_bytes(4, "little") + head + packed + kept + content[at:]
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body
