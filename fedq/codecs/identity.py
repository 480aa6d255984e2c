"""No compression: float32 as it is, the baseline of every comparison."""

from __future__ import annotations

import numpy as np

from fedq.codecs.base import Codec
from fedq.errors import DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "identity")
class Identity(Codec):
    """Send float32 as it is, exactly.

    Body: d little-endian float32, 4 d bytes.

    Example:
      >>> layout = Layout.flat(1000)
      >>> len(Identity().encode(np.ones(1000, np.float32), layout, seed=0))
      4022
    """

    @property
    def unbiased(self) -> bool:
        """True: nothing is lost."""
        return True

    def max_body_bytes(self, layout: Layout) -> int:
        """4 d."""
        return 4 * layout.size

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        return x.astype("<f4", copy=False).tobytes()

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        if len(body) != 4 * layout.size:
            raise DecodeError(f"{len(body)} bytes for {layout.size} float32")
        return np.frombuffer(body, "<f4").astype(np.float32)
