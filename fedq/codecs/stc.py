"""Sparse ternary compression: the largest magnitudes, all of one size (Sattler et al. 2019)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from fedq.codecs import _golomb, _integers
from fedq.codecs._bits import pack, packed_bytes, unpack
from fedq.codecs._groups import floats_bytes, read_scales
from fedq.codecs.base import Codec
from fedq.codecs.top_k import largest_mask
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "stc")
class Stc(Codec):
    """Send ``mu sign(x)`` at the k largest magnitudes, with their mean magnitude mu.

    ``k = max(1, round(fraction d))``; of equal magnitudes the first are kept. The method sends what
    is lost later: ``error_feedback(inner=stc)``.

    Body: mu, float32. Unless it is zero, then follow for ``golomb`` the signs of kept coordinates,
    one bit each, and the gaps between them in Golomb-Rice code with the paper's best parameter; for
    ``range`` the ternary vector, range-coded (at most 2 bits each).

    Args:
      fraction: Of all coordinates, in (0, 1].
      coding: Of signs and positions.

    Example:
      >>> layout = Layout.flat(4)
      >>> codec = Stc(fraction=0.5)
      >>> codec.decode(codec.encode(np.array([1.0, -3.0, 2.0, 0.5]), layout), layout)
      array([ 0. , -2.5,  2.5,  0. ], dtype=float32)

    Reference:
      Sattler et al. 2019, "Robust and communication-efficient federated learning from non-iid
      data", algorithms 1 (values) and 3 (positions).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"fraction": 0.2},
        {"fraction": 0.1, "coding": "range"},
    )

    fraction: float = 0.01
    coding: Literal["golomb", "range"] = "golomb"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"codec.fraction must be in (0, 1], not {self.fraction}")

    @property
    def unbiased(self) -> bool:
        """False: small coordinates are always lost."""
        return False

    def _kept(self, layout: Layout) -> int:
        d = layout.size
        return min(d, max(1, round(self.fraction * d)))

    def max_body_bytes(self, layout: Layout) -> int:
        """Mu, signs, and the longest code of the gaps; or mu and two bits per coordinate."""
        d, k = layout.size, self._kept(layout)
        if self.coding == "range":
            return 4 + packed_bytes(d, 2)
        return 4 + packed_bytes(k, 1) + _golomb.max_bytes(k, d)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        k = self._kept(layout)
        mask = largest_mask(x, k)
        kept = x[mask == 1]
        mu = np.float32(np.abs(kept).sum(dtype=np.float64) / max(k, 1))
        head = floats_bytes(np.array([mu]))
        if mu == 0:
            return head
        if self.coding == "range":
            signs = np.where(x < 0, -mask, mask).astype(np.int32)
            return head + _integers.encode(signs + np.int32(1), layout, 2, centre=1)
        negative = (kept < 0).astype(np.int32)
        return head + pack(negative, 1) + _golomb.encode(np.flatnonzero(mask), x.size)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        d, k = layout.size, self._kept(layout)
        (mu,), body = read_scales(body, 1)
        y = np.zeros(d, np.float32)
        if mu == 0:
            if len(body):
                raise DecodeError("nothing is kept, and yet there are positions")
        elif self.coding == "range":
            signs = _integers.decode(body, layout, 2, centre=1) - 1
            if (signs > 1).any() or np.count_nonzero(signs) != k:
                raise DecodeError(f"not {k} coordinates are kept, or a sign is out of range")
            y[:] = signs * mu
        else:
            size = packed_bytes(k, 1)
            negative = unpack(body[:size], k, 1)
            y[_golomb.decode(body[size:], k, d)] = np.where(negative == 1, -mu, mu)
        return y
