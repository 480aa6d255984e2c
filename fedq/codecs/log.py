"""Power-of-two levels: natural compression (Horvath et al. 2019; Miyashita et al. 2016)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import (
    Sharing,
    floats_bytes,
    fractions,
    group_sizes,
    largest,
    pieces,
    read_scales,
    spread,
    to_float32,
)
from fedq.codecs._integers import Entropy
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "log")
class Log(Codec):
    """Round magnitudes to ``m 2**-e``, where m is the largest of the group.

    The code is ``k = sign(x) (K - e)`` with ``K = 2**(bits - 1) - 1`` and ``e = 0 ... K - 1``; zero
    is ``k = 0``. The smallest level is ``m 2**(1 - K)``; below it a value goes there or to zero.

    ``nearest`` takes the arithmetically nearer level: relative error up to 1/3. ``stochastic`` goes
    to the upper of the two levels l < h around ``|x|`` with probability ``(|x| - l) / (h - l)``,
    which is unbiased, with variance up to ``x**2 / 8`` (more below the smallest level).

    Body: m per group, float32; then the codes ``k + K``, range-coded or packed.

    Args:
      bits: 2 to 8 per packed code.
      rounding: See above.
      scale: Who shares m.
      bucket: Coordinates per group for ``scale="bucket"``.
      entropy: ``packed`` sends exactly ``bits`` per coordinate.

    Example:
      >>> layout = Layout.flat(4)
      >>> codec = Log(bits=4)
      >>> codec.decode(codec.encode(np.array([1.0, -0.3, 0.1, 0.0]), layout), layout)
      array([ 1.   , -0.25 ,  0.125,  0.   ], dtype=float32)

    Reference:
      Horvath et al. 2019, "Natural compression for distributed deep learning", section 2.
      Miyashita et al. 2016, "Convolutional neural networks using logarithmic data representation".
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"bits": 5, "rounding": "stochastic"},
        {"bits": 2, "rounding": "stochastic", "scale": "bucket", "bucket": 16},
        {"bits": 3, "scale": "channel", "entropy": "packed"},
        {"bits": 8, "scale": "model"},
    )

    bits: int = 4
    rounding: Literal["nearest", "stochastic"] = "nearest"
    scale: Sharing = "tensor"
    bucket: int = 256
    entropy: Entropy = "max"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"codec.bits must be from 2 to 8, not {self.bits}")
        if not 1 <= self.bucket < 1 << 31:
            raise ConfigError(f"codec.bucket must be at least 1, not {self.bucket}")

    @property
    def unbiased(self) -> bool:
        """Whether rounding is stochastic."""
        return self.rounding == "stochastic"

    @property
    def _top(self) -> int:
        return (1 << self.bits - 1) - 1

    def max_body_bytes(self, layout: Layout) -> int:
        """Scales and packed codes."""
        groups = group_sizes(layout, self.scale, self.bucket).size
        return 4 * groups + packed_bytes(layout.size, self.bits)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, self.scale, self.bucket)
        scales = largest(x, sizes)
        top = self._top
        m = spread(scales, sizes)
        ratio = np.abs(x) / np.where(m > 0, m, 1.0)  # 0 ... 1, float64
        # The level at or below the ratio is 2**(k - top), or 0 for k = 0.
        k = np.where(ratio > 0, np.clip(np.frexp(ratio)[1] - 1 + top, 0, top), 0)
        lower = np.where(k > 0, np.ldexp(1.0, k - top), 0.0)
        upper = np.ldexp(1.0, np.minimum(k + 1, top) - top)
        rise = np.divide(ratio - lower, upper - lower, out=np.zeros(x.size), where=upper > lower)
        if self.unbiased:
            k += rise > fractions(seed, x.size, self.rounding)
        else:
            k += rise >= 0.5
        codes = np.where(x < 0, -k, k).astype(np.int32) + np.int32(top)
        return floats_bytes(scales) + _integers.encode(
            codes, layout, self.bits, entropy=self.entropy, centre=top
        )

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, self.scale, self.bucket)
        scales, body = read_scales(body, sizes.size)
        top = self._top
        codes = _integers.decode(body, layout, self.bits, entropy=self.entropy, centre=top)
        y = np.empty(layout.size, np.float32)
        for part, m in pieces(scales, sizes):
            k = codes[part] - top
            if (k > top).any() or k[m == 0].any():
                raise DecodeError("a code is out of range")
            y[part] = to_float32(np.sign(k) * np.ldexp(m, np.abs(k) - top))
        return y
