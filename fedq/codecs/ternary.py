"""TernGrad: stochastic rounding to {-s, 0, s} (Wen et al. 2017)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import (
    floats_bytes,
    fractions,
    group_sizes,
    largest,
    pieces,
    read_scales,
    spread,
    starts,
)
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "ternary")
class Ternary(Codec):
    """Send ``s sign(x)`` with probability ``|x| / s`` and zero otherwise.

    With ``s = max|x|`` of each tensor this is unbiased, with variance ``|x| (s - |x|)``. Clipping
    at ``clip_sigma`` standard deviations (the paper uses 2.5) makes s and so the variance smaller,
    and the codec biased.

    Body: s per tensor, float32; then the codes, range-coded (at most 2 bits each).

    Args:
      clip_sigma: Magnitudes are clipped at this many root mean squares of their tensor; 0 is never.

    Example:
      >>> layout = Layout.flat(3)
      >>> codec = Ternary()
      >>> codec.decode(codec.encode(np.array([-2.0, 0.0, 2.0]), layout), layout)
      array([-2.,  0.,  2.], dtype=float32)

    Reference:
      Wen et al. 2017, "TernGrad: ternary gradients to reduce communication in distributed deep
      learning", sections 3.1 and 3.4.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"clip_sigma": 2.5})

    clip_sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clip_sigma < float("inf"):
            raise ConfigError(f"codec.clip_sigma must be 0 (off) or more, not {self.clip_sigma}")

    @property
    def unbiased(self) -> bool:
        """Whether nothing is clipped."""
        return self.clip_sigma == 0

    def max_body_bytes(self, layout: Layout) -> int:
        """Scales and two bits per coordinate."""
        return 4 * group_sizes(layout, "tensor", 0).size + packed_bytes(layout.size, 2)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, "tensor", 0)
        scales = largest(x, sizes)
        if self.clip_sigma and x.size:
            power = np.add.reduceat(np.square(x, dtype=np.float64), starts(sizes)) / sizes
            scales = np.minimum(scales, self.clip_sigma * np.sqrt(power)).astype(np.float32)
        s = spread(scales, sizes)
        u = fractions(seed, x.size, "ternary")
        kept = np.abs(x) > u * s
        codes = np.where(kept, np.sign(x), 0).astype(np.int32) + np.int32(1)
        # A tiny tensor may be clipped to zero altogether.
        codes[s == 0] = 1
        return floats_bytes(scales) + _integers.encode(codes, layout, 2, centre=1)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, "tensor", 0)
        scales, body = read_scales(body, sizes.size)
        codes = _integers.decode(body, layout, 2, centre=1)
        y = np.empty(layout.size, np.float32)
        for part, s in pieces(scales, sizes):
            k = codes[part] - 1
            if (k > 1).any() or k[s == 0].any():
                raise DecodeError("a code is out of range")
            y[part] = k * s
        return y
