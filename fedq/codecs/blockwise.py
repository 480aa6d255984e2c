"""Block-wise tables of levels: dynamic 8-bit (Dettmers et al. 2022), NF4 (Dettmers et al. 2023)."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import floats_bytes, group_sizes, largest, read_scales
from fedq.codecs._integers import Entropy
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

Code = Literal["nf4", "fp4", "dynamic8"]


@register("codec", "blockwise")
class Blockwise(Codec):
    """Divide by the largest magnitude of a block, and send the index of the nearest table entry.

    Tables, ascending within [-1, 1], with an exact zero::

        dynamic8   256 levels: of seven decades up to 10**-6 ... 1, the i-th cut into 2**i equal
                   parts, the middles of parts, with either sign; and 0 and 1
        nf4        16 quantiles of a normal distribution, so that each is as likely
        fp4        +-(0, 1/16, 2, 3, 4, 6, 8, 12) / 12, as bitsandbytes defines it

    Halfway values go to the lower level. Biased; NVFlare's quantization filters use these codes.

    Body: largest magnitude per block, float32; then the indices, range-coded or packed. With
    ``double``, the former are themselves sent less their mean: mean, float32; then the body of
    ``Blockwise("dynamic8", block=256, entropy="packed")``.

    Args:
      code: See above.
      block: Coordinates per block; bitsandbytes takes 64 for 4 bits and 4096 for 8.
      double: Quantize the scales too (QLoRA's double quantization): 8 bits per block, not 32.
      entropy: ``packed`` sends exactly 4 or 8 bits per coordinate.

    Example:
      >>> layout = Layout.flat(4096)
      >>> x = np.sin(np.arange(4096, dtype=np.float32))
      >>> [len(Blockwise(double=d, entropy="packed").encode(x, layout)) for d in (False, True)]
      [2329, 2147]

    Reference:
      Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", sections 2.1 and 2.2;
      Dettmers et al. 2023, "QLoRA", section 3 and appendix E.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"code": "dynamic8", "block": 4096},
        {"code": "nf4", "block": 16, "double": True, "entropy": "packed"},
        {"code": "fp4", "entropy": "packed"},
    )

    code: Code = "nf4"
    block: int = 64
    double: bool = False
    entropy: Entropy = "max"

    def __post_init__(self) -> None:
        if not 1 <= self.block < 1 << 31:
            raise ConfigError(f"codec.block must be at least 1, not {self.block}")

    @property
    def unbiased(self) -> bool:
        """False: levels are nearest."""
        return False

    @property
    def _bits(self) -> int:
        return (table(self.code).size - 1).bit_length()

    def max_body_bytes(self, layout: Layout) -> int:
        """Scales and packed indices."""
        blocks = group_sizes(layout, "bucket", self.block).size
        scales = 4 * blocks
        if self.double:
            scales = 4 + _OF_SCALES.max_body_bytes(Layout.flat(blocks))
        return scales + packed_bytes(layout.size, self._bits)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, "bucket", self.block)
        scales = largest(x, sizes)
        scale = np.repeat(np.where(scales > 0, scales, np.float32(1)), sizes).astype(np.float64)
        levels = table(self.code).astype(np.float64)
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x / scale).astype(np.int32)
        head = self._double(scales) if self.double else floats_bytes(scales)
        return head + _integers.encode(
            codes, layout, self._bits, entropy=self.entropy, centre=self._zero
        )

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, "bucket", self.block)
        if self.double:
            scales, body = self._read_double(body, sizes.size)
        else:
            scales, body = read_scales(body, sizes.size)
        codes = _integers.decode(body, layout, self._bits, entropy=self.entropy, centre=self._zero)
        levels, scale = table(self.code), np.repeat(scales, sizes)
        if (codes >= levels.size).any():
            raise DecodeError("an index is beyond the table")
        if not self.double and (codes[scale == 0] != self._zero).any():
            raise DecodeError("a block of zeros has a level")
        y: Vector = levels[codes] * scale
        return y

    @property
    def _zero(self) -> int:
        return int(np.searchsorted(table(self.code), 0))

    @staticmethod
    def _double(scales: Vector) -> bytes:
        mean = np.float32(scales.mean(dtype=np.float64)) if scales.size else np.float32(0)
        apart = Layout.flat(scales.size)
        return floats_bytes(np.array([mean])) + _OF_SCALES._encode(scales - mean, apart, 0)

    @staticmethod
    def _read_double(body: memoryview, count: int) -> tuple[Vector, memoryview]:
        mean, body = read_scales(body, 1)
        apart = Layout.flat(count)
        size = _OF_SCALES.max_body_bytes(apart)
        scales = mean + _OF_SCALES._decode(body[:size], apart, 0)
        return np.clip(scales, 0, np.finfo(np.float32).max), body[size:]


@cache
def table(code: Code) -> NDArray[np.float32]:
    """Return the levels of a code, ascending float32; equal on every machine."""
    if code == "nf4":
        return np.array(_NF4, np.float32)
    if code == "fp4":
        half = [number / 12 for number in (1 / 16, 2, 3, 4, 6, 8, 12)]
        return np.array(sorted([0.0, *half, *(-level for level in half)]), np.float32)
    # Middles of 2**i parts of [0.1, 1], times 10**(i - 6), as quotients of whole numbers.
    half = [
        (2 ** (i + 1) + 9 * (2 * j + 1)) / (10 * 2 ** (i + 1) * 10 ** (6 - i))
        for i in range(7)
        for j in range(2**i)
    ]
    return np.array(sorted([0.0, 1.0, *half, *(-level for level in half)]), np.float32)


# Quantiles of the normal distribution (QLoRA, appendix E), which no two mathematical libraries need
# compute alike: half of the mass on each side of zero, in 7 parts below and 8 above.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_OF_SCALES = Blockwise(code="dynamic8", block=256, entropy="packed")
