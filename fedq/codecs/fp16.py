"""IEEE 754 binary16: round to the nearest, ties to even (IEEE 754-2019, 3.6 and 4.3.1)."""

from __future__ import annotations

import numpy as np

from fedq.codecs.base import Codec
from fedq.errors import DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

_LARGEST = 65504.0


@register("codec", "fp16")
class Fp16(Codec):
    """Cast to half precision: relative error up to 2**-11 between 6e-5 and 65504.

    Magnitudes beyond 65504 saturate there; below 6e-8 / 2 they become zero.

    Body: d little-endian binary16, 2 d bytes.

    Example:
      >>> layout = Layout.flat(1000)
      >>> len(Fp16().encode(np.ones(1000, np.float32), layout)) - 2000
      18
    """

    @property
    def unbiased(self) -> bool:
        """False: the same value is always rounded the same way."""
        return False

    def max_body_bytes(self, layout: Layout) -> int:
        """2 d."""
        return 2 * layout.size

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        return np.clip(x, -_LARGEST, _LARGEST).astype("<f2").tobytes()

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        if len(body) != 2 * layout.size:
            raise DecodeError(f"{len(body)} bytes for {layout.size} binary16")
        return np.frombuffer(body, "<f2").astype(np.float32)
