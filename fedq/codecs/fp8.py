"""8-bit floating point (Micikevicius et al. 2022), at random between levels (Wang et al. 2024)."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import (
    Sharing,
    Wide,
    floats_bytes,
    fractions,
    group_sizes,
    largest,
    pieces,
    read_scales,
    to_float32,
)
from fedq.codecs._integers import Entropy
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

Format = Literal["e4m3", "e5m2"]


@register("codec", "fp8")
class Fp8(Codec):
    """Divide by a scale that maps the group's largest magnitude to the format's, and round.

    Formats, with subnormals; NaN, infinity and negative zero are not sent::

        e4m3   +-1.xxx 2**e, e = -6 ... 8, up to 448
        e5m2   +-1.xx 2**e, e = -14 ... 15, up to 57344

    ``stochastic`` goes to one of the two levels around a value so that the mean is the value, as
    Wang et al. send models up and down; their scales are learned clips, these follow the vector.

    Body: largest magnitude per group, float32; then the place of each level among all, 8 bits,
    range-coded or packed.

    Args:
      format: See above.
      rounding: Stochastic is unbiased, with a larger error.
      scale: Who shares a scale.
      bucket: Coordinates per scale, with ``scale=bucket``.
      entropy: ``packed`` sends exactly 8 bits per coordinate.

    Example:
      >>> layout = Layout.flat(4096)
      >>> x = np.sin(np.arange(4096, dtype=np.float32))
      >>> codec = Fp8(rounding="nearest", entropy="packed")
      >>> payload = codec.encode(x, layout)
      >>> len(payload), bool((abs(codec.decode(payload, layout) - x) <= abs(x) / 16 + 2e-6).all())
      (4121, True)

    Reference:
      Micikevicius et al. 2022, "FP8 formats for deep learning", table 1; Wang et al. 2024, "Towards
      federated learning with on-device training and communication in 8-bit floating point",
      section 3.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"format": "e5m2", "entropy": "packed"},
        {"rounding": "nearest", "scale": "bucket", "bucket": 32},
    )

    format: Format = "e4m3"
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    scale: Sharing = "tensor"
    bucket: int = 256
    entropy: Entropy = "max"

    def __post_init__(self) -> None:
        if not 1 <= self.bucket < 1 << 31:
            raise ConfigError(f"codec.bucket must be at least 1, not {self.bucket}")

    @property
    def unbiased(self) -> bool:
        """Whether rounding is stochastic."""
        return self.rounding == "stochastic"

    def max_body_bytes(self, layout: Layout) -> int:
        """Scales and a byte per coordinate."""
        groups = group_sizes(layout, self.scale, self.bucket).size
        return 4 * groups + packed_bytes(layout.size, 8)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, self.scale, self.bucket)
        high, levels = largest(x, sizes), table(self.format)
        u = fractions(seed, x.size, "fp8") if self.unbiased else None
        codes = np.empty(x.size, np.int32)
        for part, top in pieces(high, sizes):
            t = x[part] / np.where(top > 0, top / levels[-1], 1.0)
            if u is None:
                codes[part] = _nearest(t, levels)
                continue
            lower = np.clip(np.searchsorted(levels, t, side="right") - 1, 0, levels.size - 2)
            share = (t - levels[lower]) / (levels[lower + 1] - levels[lower])
            codes[part] = lower + (share > u[part])
        return floats_bytes(high) + _integers.encode(
            codes, layout, 8, entropy=self.entropy, centre=levels.size // 2
        )

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, self.scale, self.bucket)
        high, body = read_scales(body, sizes.size)
        levels = table(self.format)
        zero = levels.size // 2
        codes = _integers.decode(body, layout, 8, entropy=self.entropy, centre=zero)
        if (codes >= levels.size).any():
            raise DecodeError("a code is beyond the format's levels")
        y = np.empty(layout.size, np.float32)
        for part, top in pieces(high, sizes):
            if (codes[part][top == 0] != zero).any():
                raise DecodeError("a group of zeros has a level")
            y[part] = to_float32(levels[codes[part]] * (top / levels[-1]))
        return y


def _nearest(t: Wide, levels: Wide) -> NDArray[np.int64]:
    """Return the places of the nearest levels; a tie goes to the even significand."""
    borders = (levels[1:] + levels[:-1]) / 2
    lower, upper = (np.searchsorted(borders, t, side=side) for side in ("left", "right"))
    # Places count significands from zero's, so that their parities agree with the middle's.
    return np.where((lower - levels.size // 2) % 2 == 0, lower, upper)


@cache
def table(form: Format) -> Wide:
    """Return the finite levels of a format, ascending float64, symmetric about one zero.

    >>> [int(table(form).size) for form in ("e4m3", "e5m2")], float(table("e4m3")[-1])
    ([253, 247], 448.0)
    """
    fraction, least, count = (3, -6, 126) if form == "e4m3" else (2, -14, 123)
    place = np.arange(1, count + 1)
    exponent, rest = place >> fraction, place & ((1 << fraction) - 1)
    significand = np.where(exponent > 0, rest + (1 << fraction), rest)
    half = np.ldexp(significand.astype(float), np.maximum(exponent, 1) - 1 + least - fraction)
    return np.concatenate([-half[::-1], [0.0], half])
