"""Natural compression: stochastic rounding to powers of two (Horvath et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import cuts, fractions, to_float32
from fedq.codecs._integers import Entropy
from fedq.codecs.base import Codec
from fedq.errors import DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

_LARGEST = float(np.finfo(np.float32).max)
_LEAST = -149  # 2**_LEAST is the smallest float32
_LEVELS = 255


@register("codec", "natural")
class Natural(Codec):
    """Round magnitudes to one of the two powers of two around them, at random.

    For ``2**e <= |x| < 2**(e + 1)`` the upper one is taken with probability ``|x| / 2**e - 1``:
    unbiased, with ``E|y - x|**2 <= |x|**2 / 8``, whatever the other coordinates are. As in the
    paper a sign and 8 bits of exponent are sent, 9 bits in all.

    The 255 exponents end at the largest of this vector, so that subnormal vectors are rounded
    like others; below the smallest, values go there or to zero. The level 2**128, which float32
    lacks, is the largest float32 instead, still without bias.

    Body: e + 150 of the largest level 2**e, u16 (0 for a zero vector); then the codes
    ``c = 255 + sign(x) j`` with ``|y| = 2**(e + 1 - j)``, or j = 0 for zero, range-coded or packed.

    Args:
      entropy: ``packed`` sends exactly 9 bits per coordinate.

    Example:
      >>> layout = Layout.flat(1000)
      >>> x = np.sin(np.arange(1000, dtype=np.float32))
      >>> y = Natural().decode(Natural().encode(x, layout, seed=1), layout)
      >>> sorted({float(a) for a in abs(y[1:50])})
      [0.015625, 0.125, 0.25, 0.5, 1.0]
      >>> round(float(np.mean((y - x) ** 2) / np.mean(x**2)), 2)
      0.05

    Reference:
      Horvath et al. 2022, "Natural compression for distributed deep learning", definition 1,
      theorem 1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"entropy": "packed"})

    entropy: Entropy = "max"

    @property
    def unbiased(self) -> bool:
        """True."""
        return True

    def max_body_bytes(self, layout: Layout) -> int:
        """The largest exponent and nine bits per coordinate."""
        return 2 + packed_bytes(layout.size, 9)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        size = np.abs(x.astype(np.float64))
        # 2**(exponent - 1) <= size < 2**exponent
        exponent = np.frexp(size)[1]
        top = int(exponent[size > 0].max()) if size.any() else _LEAST - 1
        j = np.where(size > 0, np.minimum(top + 2 - exponent, _LEVELS + 1), _LEVELS + 1)
        upper = np.minimum(np.ldexp(1.0, top + 2 - j), _LARGEST)
        lower = np.where(j <= _LEVELS, np.ldexp(1.0, top + 1 - j), 0.0)
        rise = (size - lower) / (upper - lower) > fractions(seed, x.size, "natural")
        j = np.where(rise, j - 1, j) % (_LEVELS + 1)
        codes = np.where(x < 0, _LEVELS - j, _LEVELS + j).astype(np.int32)
        head = (top - _LEAST + 1).to_bytes(2, "little")
        return head + _integers.encode(codes, layout, 9, entropy=self.entropy, centre=_LEVELS)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        if len(body) < 2:
            raise DecodeError("the largest exponent is missing")
        top = int.from_bytes(body[:2], "little") + _LEAST - 1
        codes = _integers.decode(body[2:], layout, 9, entropy=self.entropy, centre=_LEVELS)
        j = np.abs(codes - _LEVELS)
        least = int(j[j > 0].min()) if j.any() else 0
        if top > 128 or j.max(initial=0) > min(_LEVELS, top + 1 - _LEAST) or least > 2:
            raise DecodeError("an exponent is out of range")
        if (least == 0) != (top < _LEAST):
            raise DecodeError("a zero vector has a largest exponent, or another one has none")
        y = np.empty(layout.size, np.float32)
        for part in cuts(layout.size):
            size = np.where(j[part] > 0, np.ldexp(1.0, top + 1 - j[part]), 0.0)
            y[part] = to_float32(np.where(codes[part] < _LEVELS, -size, size))
        return y
