"""bfloat16: float32 with an 8-bit significand, nearest, ties to even (Kalamkar et al. 2019)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.codecs.base import Codec
from fedq.errors import DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

_LARGEST = np.uint32(0x7F7F)  # the largest finite bfloat16, 3.39e38


@register("codec", "bf16")
class Bf16(Codec):
    """Keep the upper half of each float32: relative error up to 2**-8 over its whole range.

    Magnitudes beyond the largest bfloat16, 3.39e38, saturate there.

    Body: d little-endian bfloat16, 2 d bytes.

    Example:
      >>> layout = Layout.flat(1)
      >>> codec = Bf16()
      >>> codec.decode(codec.encode(np.array([3.14159]), layout), layout)
      array([3.140625], dtype=float32)

    Reference:
      Kalamkar et al. 2019, "A study of bfloat16 for deep learning training", section 2.
    """

    @property
    def unbiased(self) -> bool:
        """False: the same value is always rounded the same way."""
        return False

    def max_body_bytes(self, layout: Layout) -> int:
        """2 d."""
        return 2 * layout.size

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        word = x.view(np.uint32)
        magnitude = word & np.uint32(0x7FFFFFFF)
        even = (magnitude >> np.uint32(16)) & np.uint32(1)
        rounded = np.minimum((magnitude + np.uint32(0x7FFF) + even) >> np.uint32(16), _LARGEST)
        sign = (word >> np.uint32(16)) & np.uint32(0x8000)
        word16: NDArray[np.uint16] = (sign | rounded).astype("<u2")
        return word16.tobytes()

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        if len(body) != 2 * layout.size:
            raise DecodeError(f"{len(body)} bytes for {layout.size} bfloat16")
        word = np.frombuffer(body, "<u2").astype(np.uint32) << np.uint32(16)
        return word.view(np.float32)
