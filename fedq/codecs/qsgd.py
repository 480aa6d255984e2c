"""QSGD: stochastic levels of the Euclidean norm (Alistarh et al. 2017)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from fedq.codecs import _elias, _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import (
    Sharing,
    floats_bytes,
    fractions,
    group_sizes,
    pieces,
    read_scales,
    spread,
    starts,
    to_float32,
)
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "qsgd")
class Qsgd(Codec):
    """Round ``|x| / norm`` to multiples of ``1 / s``, at random.

    With the Euclidean norm of a coordinate's group and u uniform in (0, 1)::

        k = sign(x) floor(s |x| / norm + u)       y = k norm / s

    Unbiased, ``E|y - x|**2 <= min(n / s**2, sqrt(n) / s) |x|**2`` for groups of n, and sparse: at
    most ``s (s + sqrt(n))`` non-zero levels are expected. A norm beyond float32 is sent as the
    largest float32, which lowers the variance. Values within a level of that limit saturate.

    Body: norm per group, float32 (rounded up); then the levels.

    Args:
      levels: s, 1 to 32767.
      scale: Who shares a norm.
      bucket: Coordinates per group for ``scale="bucket"``.
      coding: Of the levels: ``elias`` is the paper's code of runs, signs and magnitudes
        (:func:`fedq.codecs._elias.encode`), in one piece over all groups; ``range`` the range
        coder.

    Example:
      >>> layout = Layout.flat(512)
      >>> x = np.sin(np.arange(512, dtype=np.float32))
      >>> [len(Qsgd(levels=4, coding=c).encode(x, layout, seed=1)) for c in ("elias", "range")]
      [96, 78]

    Reference:
      Alistarh et al. 2017, "QSGD: communication-efficient SGD via gradient quantization and
      encoding", sections 3.1 (levels), 3.2 (sparse code) and 4 (buckets), appendix (dense code).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"levels": 127, "scale": "model", "coding": "elias"},
        {"levels": 1, "bucket": 4, "coding": "elias"},
    )

    levels: int = 16
    scale: Sharing = "bucket"
    bucket: int = 512
    coding: Literal["range", "elias"] = "range"

    def __post_init__(self) -> None:
        if not 1 <= self.levels < 1 << 15:
            raise ConfigError(f"codec.levels must be from 1 to 32767, not {self.levels}")
        if not 1 <= self.bucket < 1 << 31:
            raise ConfigError(f"codec.bucket must be at least 1, not {self.bucket}")

    @property
    def unbiased(self) -> bool:
        """True."""
        return True

    @property
    def _bits(self) -> int:
        return (2 * self.levels).bit_length()

    def max_body_bytes(self, layout: Layout) -> int:
        """Norms, and packed levels or the longest Elias code."""
        codes = packed_bytes(layout.size, self._bits)
        if self.coding == "elias":
            codes = _elias.max_bytes(layout.size, self.levels)
        return 4 * group_sizes(layout, self.scale, self.bucket).size + codes

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, self.scale, self.bucket)
        norms = _norms(x, sizes)
        norm = spread(norms, sizes)
        t = self.levels * np.abs(x.astype(np.float64)) / np.where(norm > 0, norm, 1.0)
        size = np.floor(t + fractions(seed, x.size, "qsgd"))
        k = np.where(x < 0, -size, size).astype(np.int32)
        if self.coding == "elias":
            return floats_bytes(norms) + _elias.encode(k)
        codes = k + np.int32(self.levels)
        return floats_bytes(norms) + _integers.encode(codes, layout, self._bits, centre=self.levels)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, self.scale, self.bucket)
        norms, body = read_scales(body, sizes.size)
        if self.coding == "elias":
            k = _elias.decode(body, layout.size, self.levels)
        else:
            k = _integers.decode(body, layout, self._bits, centre=self.levels)
            k -= self.levels
        y = np.empty(layout.size, np.float32)
        for part, norm in pieces(norms, sizes):
            if (k[part] > self.levels).any() or k[part][norm == 0].any():
                raise DecodeError("a level is out of range")
            y[part] = to_float32(k[part] * norm / self.levels)
        return y


def _norms(x: Vector, sizes: np.ndarray[Any, np.dtype[np.int64]]) -> Vector:
    """Return the norm of each group, (groups,) float32, rounded up: no level exceeds s."""
    if not x.size:
        return np.zeros(0, np.float32)
    norms = np.sqrt(np.add.reduceat(np.square(x, dtype=np.float64), starts(sizes)))
    near = to_float32(norms)
    up = np.nextafter(near, np.finfo(np.float32).max)
    return np.where(near < norms, up, near)
