"""Top-k sparsification: the largest magnitudes only (Aji and Heafield 2017, Stich et al. 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import wire
from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs.base import Codec
from fedq.codecs.fp16 import Fp16
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "top_k")
class TopK(Codec):
    """Keep the ``k = max(1, round(fraction d))`` largest magnitudes; the others become zero.

    Of equal magnitudes the first are kept. Positions are range-coded as a mask, which costs about
    ``H(k / d)`` bits per coordinate or less; the kept values pass through ``inner``.

    Body: varint length of the mask, mask, body of ``inner`` for k coordinates.

    Args:
      fraction: Of all coordinates, in (0, 1].
      inner: Codec of the kept values, in their order.

    Example:
      >>> layout = Layout.flat(4)
      >>> codec = TopK(fraction=0.5)
      >>> codec.decode(codec.encode(np.array([1.0, -3.0, 2.0, 0.5]), layout), layout)
      array([ 0., -3.,  2.,  0.], dtype=float32)

    Reference:
      Aji and Heafield 2017, "Sparse communication for distributed gradient descent"; Stich et al.
      2018, "Sparsified SGD with memory", definition 2.1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"fraction": 0.1, "inner": {"name": "uniform", "bits": 4, "rounding": "dithered"}},
        {"fraction": 1.0, "inner": "identity"},
    )

    fraction: float = 0.01
    inner: Codec = Fp16()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"codec.fraction must be in (0, 1], not {self.fraction}")

    @property
    def unbiased(self) -> bool:
        """False: small coordinates are always lost."""
        return False

    def max_body_bytes(self, layout: Layout) -> int:
        """One bit per coordinate, its length, and ``inner``'s bound for k coordinates."""
        mask = packed_bytes(layout.size, 1)
        return len(wire.varint(mask)) + mask + self.inner.max_body_bytes(self._kept(layout))

    def _kept(self, layout: Layout) -> Layout:
        d = layout.size
        return Layout.flat(min(d, max(1, round(self.fraction * d))))

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        kept = self._kept(layout)
        mask = largest_mask(x, kept.size)
        part = _integers.encode(mask, layout, 1)
        return wire.varint(len(part)) + part + self.inner._encode(x[mask == 1], kept, seed)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        kept = self._kept(layout)
        reader = wire.Reader(body)
        mask = _integers.decode(reader.take(reader.varint()), layout, 1)
        if mask.sum() != kept.size:
            raise DecodeError(f"{mask.sum()} coordinates are kept, not {kept.size}")
        rest = reader.rest()
        if len(rest) > self.inner.max_body_bytes(kept):
            raise DecodeError(f"the kept values are too long for {kept.size} coordinates")
        y = np.zeros(layout.size, np.float32)
        y[mask == 1] = self.inner._decode(rest, kept, seed)
        return y


def largest_mask(x: Vector, k: int) -> NDArray[np.int32]:
    """Return 1 for the k largest magnitudes and 0 for others, (d,); of equal ones the first."""
    mask = np.zeros(x.size, np.int32)
    if x.size:
        size = np.abs(x)
        least = np.partition(size, x.size - k)[x.size - k]
        mask[size > least] = 1
        ties = np.flatnonzero(size == least)
        mask[ties[: k - int(mask.sum())]] = 1
    return mask
