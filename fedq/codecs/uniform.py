"""Uniform quantization: nearest, stochastic (Alistarh et al. 2017) or dithered (Schuchman 1964)."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import (
    Sharing,
    floats_bytes,
    group_sizes,
    largest,
    means,
    pieces,
    read_floats,
    read_scales,
    starts,
)
from fedq.codecs._integers import Entropy
from fedq.codecs._range import SIDE_FLIP
from fedq.codecs._uniform import dequantize, quantize
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.random import words
from fedq.registry import register


@register("codec", "uniform")
class Uniform(Codec):
    """Round to evenly spaced levels, then code the level numbers.

    With offset ``o``, step ``s`` and zero point ``z`` of a coordinate's group, the real-valued code
    of ``x`` is ``t = (x - o) / s + z`` and the integer sent is::

        nearest      c = round(t)           y = (c - z) s + o              |y - x| <= s / 2
        stochastic   c = floor(t + u)       y = (c - z) s + o              |y - x| <= s
        dithered     c = floor(t + u)       y = (c - z - u + 1/2) s + o    |y - x| <= s / 2

    where ``u`` is uniform in (0, 1), of 32 bits. Stochastic and dithered rounding are unbiased for
    every ``x`` (to 2**-33 of a step) because no level is ever clipped. The dithered error is
    uniform in +-s/2 and independent of ``x``: variance s**2 / 12, where stochastic rounding has up
    to s**2 / 4 (but less for ``|x| < s / 12``). Both ends draw the same ``u`` from the seed, and
    the range coder knows it too.

    Symmetric: ``o = 0`` and ``s = max|x| / z`` with ``z = 2**(bits - 1) - 1``; one bit gives the
    two levels +-max|x| (+-mean|x| for nearest). Asymmetric: ``o = min x``, ``z = 0`` and
    ``s = (max x - min x) / (2**bits - 1)``. Values within half a step of the float32 limit
    saturate.

    Body: ``max|x|`` per group (or ``min x`` of all groups, then ``max x``), float32; then the
    codes, range-coded or, where that is shorter, packed.

    Args:
      bits: 1 to 16 per packed code.
      symmetric: Levels symmetric about zero, or from the minimum to the maximum.
      rounding: See above.
      scale: Who shares a step. One step for the whole ``model`` is the best with range coding:
        it minimises the squared error at a given rate (reverse water-filling).
      bucket: Coordinates per group for ``scale="bucket"``.
      entropy: ``packed`` sends exactly ``bits`` per coordinate.

    Example:
      >>> layout = Layout.flat(1000)
      >>> x = np.sin(np.arange(1000, dtype=np.float32))
      >>> codec = Uniform(bits=4, rounding="dithered", entropy="packed")
      >>> payload = codec.encode(x, layout, seed=1)
      >>> len(payload)
      531
      >>> float(np.abs(codec.decode(payload, layout) - x).max()) <= 0.5 / 7
      True

    Reference:
      Schuchman 1964, "Dither signals and their effect on quantization noise"; Ziv 1985, "On
      universal quantization"; Alistarh et al. 2017, "QSGD", section 3.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"bits": 4, "rounding": "dithered", "scale": "model"},
        {"bits": 2, "rounding": "dithered", "scale": "bucket", "bucket": 64},
        {"bits": 6, "rounding": "dithered", "symmetric": False},
        {"bits": 1, "rounding": "dithered", "symmetric": False},
        {"bits": 4, "rounding": "stochastic", "scale": "channel"},
        {"bits": 1, "rounding": "stochastic"},
        {"bits": 3, "rounding": "stochastic", "symmetric": False, "entropy": "packed"},
        {"bits": 1, "symmetric": False, "scale": "bucket", "bucket": 32},
        {"bits": 1},
        {"bits": 16, "scale": "model"},
        {"bits": 8, "symmetric": False, "scale": "channel"},
        {"bits": 5, "scale": "model", "entropy": "packed"},
    )

    bits: int = 8
    symmetric: bool = True
    rounding: Literal["nearest", "stochastic", "dithered"] = "nearest"
    scale: Sharing = "tensor"
    bucket: int = 256
    entropy: Entropy = "max"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ConfigError(f"codec.bits must be from 1 to 16, not {self.bits}")
        if not 1 <= self.bucket < 1 << 31:
            raise ConfigError(f"codec.bucket must be at least 1, not {self.bucket}")
        if self.bits == 1 and self.symmetric and self.rounding == "dithered":
            raise ConfigError(
                "one symmetric bit cannot be dithered exactly; set codec.bits=2 or more, "
                "codec.symmetric=false or codec.rounding=stochastic"
            )

    @property
    def unbiased(self) -> bool:
        """Whether rounding is stochastic or dithered."""
        return self.rounding != "nearest"

    def max_body_bytes(self, layout: Layout) -> int:
        """Scales and packed codes."""
        groups = group_sizes(layout, self.scale, self.bucket).size
        return (4 if self.symmetric else 8) * groups + packed_bytes(layout.size, self.bits)

    @property
    def predictive(self) -> bool:
        """Whether levels are nearest and range-coded: the reference's level is the likeliest."""
        return self.rounding == "nearest" and self.entropy != "packed"

    def _encode_beside(self, x: Vector, reference: Vector, layout: Layout, seed: int) -> bytes:
        return self._encode(x, layout, seed, reference)

    def _decode_beside(
        self, body: memoryview, reference: Vector, layout: Layout, seed: int
    ) -> Vector:
        return self._decode(body, layout, seed, reference)

    def _encode(
        self, x: Vector, layout: Layout, seed: int, reference: Vector | None = None
    ) -> bytes:
        sizes = group_sizes(layout, self.scale, self.bucket)
        if not self.symmetric:
            edges = starts(sizes)
            low, high = (f.reduceat(x, edges) if x.size else x for f in (np.minimum, np.maximum))
            low, high = low + np.float32(0), high + np.float32(0)  # no negative zero
            head = floats_bytes(low) + floats_bytes(high)
        else:
            high = largest(x, sizes)
            if self.bits == 1 and self.rounding == "nearest":
                high = means(x, sizes)
            low = -high
            head = floats_bytes(high)
        grid = _Grid(self, low, high, sizes, seed)
        codes = quantize(x, grid.words, *grid.levels)
        centre, side = grid.prediction(reference)
        return head + _integers.encode(
            codes, layout, self.bits, entropy=self.entropy, centre=centre, side=side
        )

    def _decode(
        self, body: memoryview, layout: Layout, seed: int, reference: Vector | None = None
    ) -> Vector:
        sizes = group_sizes(layout, self.scale, self.bucket)
        if self.symmetric:
            high, body = read_scales(body, sizes.size)
            low = -high
        else:
            low, body = read_floats(body, sizes.size)
            high, body = read_floats(body, sizes.size)
            if (low > high).any():
                raise DecodeError("the minimum of a group exceeds its maximum")
        grid = _Grid(self, low, high, sizes, seed)
        centre, side = grid.prediction(reference)
        codes = _integers.decode(
            body, layout, self.bits, entropy=self.entropy, centre=centre, side=side
        )
        return dequantize(codes, grid.words if grid.dithered else None, *grid.levels)


class _Grid:
    """Levels of every group, and the random word of every coordinate; the same on both ends."""

    def __init__(
        self,
        codec: Uniform,
        low: NDArray[np.float32],
        high: NDArray[np.float32],
        sizes: NDArray[np.int64],
        seed: int,
    ) -> None:
        half = (1 << codec.bits - 1) - 1
        wide = high.astype(np.float64)
        if codec.symmetric and half:
            zero, top = half, 2 * half
            step, offset = wide / half, np.zeros(sizes.size)
        else:
            zero, top = 0, (1 << codec.bits) - 1
            offset = low.astype(np.float64)
            step = (wide - offset) / top
        self.levels = (sizes, offset, step, zero, top)
        self.packed = codec.entropy == "packed"
        self.dithered = codec.rounding == "dithered"
        self.words: NDArray[np.uint32] | None = None
        if codec.rounding != "nearest":
            self.words = words(seed, int(sizes.sum()), codec.rounding)

    def prediction(
        self, reference: Vector | None = None
    ) -> tuple[int | NDArray[np.int32], NDArray[np.uint8] | None]:
        """Return the code of a small ``x`` or of the reference, and what the dither says of it.

        Packed codes have no use for it.
        """
        if self.packed:
            return 0, None
        sizes, offset, step, zero, top = self.levels
        centre = np.empty(int(sizes.sum()), np.int32)
        side = np.empty(centre.size if self.dithered else 0, np.uint8)
        for (part, s), (_, o) in zip(pieces(step, sizes), pieces(offset, sizes), strict=True):
            expected = 0.0 if reference is None else reference[part]
            t = np.where(s > 0, (expected - o) / np.where(s > 0, s, 1.0), 0.0) + zero
            if self.dithered and self.words is not None:
                t += (self.words[part] + 0.5) * 2.0**-32
                place = np.minimum((t - np.floor(t)) * 1024, 1023)  # it may round up to 1
                side[part] = _side_table()[place.astype(np.int64)]
                t = np.floor(t)
            else:
                t = np.rint(t)
            centre[part] = np.clip(t, 0, top)
        return centre, side if self.dithered else None


@cache
def _side_table() -> NDArray[np.uint8]:
    """Return the side information for the place of ``x = 0`` within its interval, in 1/1024.

    The nearer a border of the interval, the likelier is a code on its other side: bins grow
    geometrically from the border, and mirror so that the likelier sign is always the same.
    """
    place = np.arange(1024)
    distance = np.minimum(place, 1023 - place)
    bounds = [1, 2, 4, 8, 16, 32, 64, 96, 128, 176, 224, 272, 320, 384, 448]
    bins = np.searchsorted(bounds, distance, side="right")
    return (bins + SIDE_FLIP * (place < 512)).astype(np.uint8)
