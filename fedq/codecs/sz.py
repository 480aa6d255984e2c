"""Error-bounded lossy compression with a predictor: SZ (Di and Cappello 2016), for FedSZ (2024)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import cuts, floats_bytes, group_sizes, read_floats, starts, to_float32
from fedq.codecs._integers import Entropy
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

_PREDICTORS = ("none", "lorenzo")


@register("codec", "sz")
class Sz(Codec):
    """Round to multiples of twice an error bound, predict each from its neighbour, code the rest.

    With the bound ``b`` and a tensor's extremes, the step is ``s = 2 b (max x - min x)`` and
    ``q = round(x / s)``, so that ``|y - x| <= b (max x - min x)``. Sent is ``q_i - p_i``::

        lorenzo   p_i = q_(i-1)     the 1-D Lorenzo predictor, on what is rounded already (cuSZ)
        none      p_i = 0           or the nearest level in range
        best      of both, the one that is shorter

    Neighbours among weights have little in common, so that Lorenzo's residuals mostly take more
    bits than the weights; SZ2, which FedSZ calls, chooses by block between it and a plane.

    Body: ``min x``, then ``max x`` of all tensors, float32; 1 byte: 0 none, 1 Lorenzo; then the
    residuals, range-coded or packed.

    Args:
      bound: Relative to each tensor's range, 1e-4 to 0.25.
      predictor: See above.
      entropy: ``packed`` sends a fixed number of bits.

    Example:
      >>> layout = Layout.flat(1000)
      >>> x = np.sin(np.arange(1000, dtype=np.float32) / 50)
      >>> [len(Sz(predictor=p).encode(x, layout)) for p in ("none", "lorenzo", "best")]
      [567, 141, 139]
      >>> codec = Sz(bound=0.01)
      >>> float(np.abs(codec.decode(codec.encode(x, layout), layout) - x).max()) <= 0.02
      True

    Reference:
      Di and Cappello 2016, "Fast error-bounded lossy HPC data compression with SZ"; Tian et al.
      2020, "cuSZ", section 3; Wilkins et al. 2024, "FedSZ: leveraging error-bounded lossy
      compression for federated learning communications".
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"bound": 0.001, "predictor": "lorenzo"},
        {"predictor": "none", "entropy": "packed"},
    )

    bound: float = 0.01
    predictor: Literal["best", "lorenzo", "none"] = "best"
    entropy: Entropy = "max"

    def __post_init__(self) -> None:
        if not 1e-4 <= self.bound <= 0.25:
            raise ConfigError(f"codec.bound must be from 1e-4 to 0.25, not {self.bound}")

    @property
    def unbiased(self) -> bool:
        """False: levels are nearest."""
        return False

    @property
    def _top(self) -> int:
        """The largest difference of two levels: as many steps as the range has, and roundings."""
        return int(np.ceil(0.5 / self.bound)) + 1

    @property
    def _bits(self) -> int:
        return (2 * self._top).bit_length()

    def max_body_bytes(self, layout: Layout) -> int:
        """Extremes, the predictor and packed residuals."""
        tensors = group_sizes(layout, "tensor", 0).size
        return 8 * tensors + 1 + packed_bytes(layout.size, self._bits)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, "tensor", 0)
        edges = starts(sizes)
        low, high = (f.reduceat(x, edges) if x.size else x for f in (np.minimum, np.maximum))
        low, high = low + np.float32(0), high + np.float32(0)  # no negative zero
        q = np.empty(x.size, np.int32)
        for part, step, least, _ in self._tensors(low, high, sizes):
            q[part] = np.rint(x[part].astype(np.float64) / step) - least if step else 0
        bodies = []
        for place, name in enumerate(_PREDICTORS):
            if self.predictor in (name, "best"):
                residual = np.empty_like(q)
                for part, *_, zero in self._tensors(low, high, sizes):
                    residual[part] = (
                        np.diff(q[part], prepend=zero) if name == "lorenzo" else q[part] - zero
                    )
                codes = _integers.encode(
                    residual + self._top,
                    layout,
                    self._bits,
                    entropy=self.entropy,
                    centre=self._top,
                )
                bodies.append(bytes([place]) + codes)
        return floats_bytes(low) + floats_bytes(high) + min(bodies, key=len)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, "tensor", 0)
        low, body = read_floats(body, sizes.size)
        high, body = read_floats(body, sizes.size)
        if (low > high).any():
            raise DecodeError("the minimum of a tensor exceeds its maximum")
        if not len(body) or body[0] >= len(_PREDICTORS):
            raise DecodeError("the predictor is missing or unknown")
        name = _PREDICTORS[body[0]]
        if self.predictor not in (name, "best"):
            raise DecodeError(f"the predictor is {name}, not {self.predictor}")
        residual = _integers.decode(
            body[1:], layout, self._bits, entropy=self.entropy, centre=self._top
        )
        y = np.empty(layout.size, np.float32)
        for (part, step, least, zero), bottom in zip(
            self._tensors(low, high, sizes), low, strict=True
        ):
            most, last = (self._top if step else 0), zero
            for cut in cuts(part.stop - part.start):
                where = slice(part.start + cut.start, part.start + cut.stop)
                q = residual[where].astype(np.int64) - self._top
                q = last + np.cumsum(q) if name == "lorenzo" else zero + q
                if not 0 <= q.min() <= q.max() <= most:
                    raise DecodeError("a level is out of its tensor's range")
                last = q[-1]
                y[where] = to_float32(np.multiply(q + least, step)) if step else bottom
        return y

    def _tensors(
        self, low: Vector, high: Vector, sizes: NDArray[np.int64]
    ) -> list[tuple[slice, float, float, int]]:
        """Return each tensor's place, step, least level and the place of 0 above it, or nearest."""
        found, start = [], 0
        for bottom, top, size in zip(
            low.astype(np.float64), high.astype(np.float64), sizes, strict=True
        ):
            step = float(2 * self.bound * (top - bottom))
            least = float(np.rint(bottom / step)) if step else 0.0
            most = float(np.rint(top / step)) - least if step else 0.0
            zero = int(np.clip(-least, 0, most))
            found.append((slice(start, start + int(size)), step, least, zero))
            start += int(size)
        return found
