"""Scaled sign: one bit per coordinate (Bernstein et al. 2018, Karimireddy et al. 2019)."""

from __future__ import annotations

import numpy as np

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import (
    floats_bytes,
    group_sizes,
    means,
    pieces,
    read_scales,
    spread,
)
from fedq.codecs.base import Codec
from fedq.errors import DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "sign")
class Sign(Codec):
    """Send ``sign(x) mean|x|``, the mean over each tensor: the nearest point of that form.

    Zero counts as positive, but an all-zero tensor stays zero.

    Body: mean|x| per tensor, float32; then one bit per coordinate, range-coded if that is shorter.

    Example:
      >>> layout = Layout.flat(2)
      >>> codec = Sign()
      >>> codec.decode(codec.encode(np.array([-1.0, 3.0]), layout), layout)
      array([-2.,  2.], dtype=float32)

    Reference:
      Bernstein et al. 2018, "signSGD: compressed optimisation for non-convex problems".
      Karimireddy et al. 2019, "Error feedback fixes signSGD", section 4 (the scale).
    """

    @property
    def unbiased(self) -> bool:
        """False: the sign depends on ``x`` alone."""
        return False

    def max_body_bytes(self, layout: Layout) -> int:
        """Scales and one bit per coordinate."""
        return 4 * group_sizes(layout, "tensor", 0).size + packed_bytes(layout.size, 1)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, "tensor", 0)
        scales = means(x, sizes)
        codes = ((x < 0) & (spread(scales, sizes) > 0)).astype(np.int32)
        return floats_bytes(scales) + _integers.encode(codes, layout, 1)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, "tensor", 0)
        scales, body = read_scales(body, sizes.size)
        codes = _integers.decode(body, layout, 1)
        y = np.empty(layout.size, np.float32)
        for part, mean in pieces(scales, sizes):
            if codes[part][mean == 0].any():
                raise DecodeError("an all-zero tensor has a sign")
            y[part] = np.where(codes[part] == 1, -mean, mean)
        return y
