"""Correlated quantization: clients round against each other (Suresh et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import random
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
    spread,
    to_float32,
)
from fedq.codecs._integers import Entropy
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "correlated")
class Correlated(Codec):
    """Stochastic rounding whose thresholds cover (0, 1) evenly over n clients.

    Seeds ``n q + r`` with ``r = 0 ... n - 1`` are those of n clients in round q. All of them draw
    a permutation pi of the clients and first level c per coordinate from q; r draws g, uniform in
    (0, 1 / n). With k levels a step apart, m the largest magnitude of a coordinate's group and
    ``t = (x / m + 1) / 2`` in [0, 1]::

        i = floor((t - c) / step + pi(r) / n + g)       y = m (2 (c + i step) - 1)

    where ``c = 0, step = 1`` for two levels, and otherwise c is uniform in (-1 / k, 0) and
    ``step = (k + 1) / (k (k - 1))``. Each client is unbiased by itself, whatever its values; if
    values are near each other, errors cancel in their mean: its squared error falls as n**-2, not
    n**-1. Permutations of different coordinates are rotations of one, which leaves every
    coordinate's own law as in the paper. Values within a step of the float32 limit saturate.

    Body: m per group, float32; then the codes, range-coded or packed.

    Args:
      clients: n, 1 to 65536; numbers the clients of a round through their seeds.
      levels: k, 2 to 65536.
      scale: Who shares m.
      bucket: Coordinates per group for ``scale="bucket"``.
      entropy: ``packed`` sends whole bits.

    Example:
      >>> layout = Layout.flat(500)
      >>> x, codec = np.sin(np.arange(500, dtype=np.float32)), Correlated(clients=10)
      >>> y = [codec.decode(codec.encode(x, layout, seed), layout) for seed in range(10)]
      >>> each = np.mean([np.mean((z - x) ** 2) for z in y])
      >>> bool(np.mean((np.mean(y, axis=0) - x) ** 2) < each / 50)
      True

    Reference:
      Suresh et al. 2022, "Correlated quantization for distributed mean estimation and
      optimization", the one-dimensional algorithms for two and for k levels, per coordinate.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"clients": 7, "levels": 5, "scale": "bucket", "bucket": 32},
        {"levels": 2, "entropy": "packed"},
    )

    clients: int = 10
    levels: int = 16
    scale: Sharing = "tensor"
    bucket: int = 256
    entropy: Entropy = "max"

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= 1 << 16:
            raise ConfigError(f"codec.clients must be from 1 to 65536, not {self.clients}")
        if not 2 <= self.levels <= 1 << 16:
            raise ConfigError(f"codec.levels must be from 2 to 65536, not {self.levels}")
        if not 1 <= self.bucket < 1 << 31:
            raise ConfigError(f"codec.bucket must be at least 1, not {self.bucket}")

    @property
    def unbiased(self) -> bool:
        """True, for each client by itself."""
        return True

    @property
    def _bits(self) -> int:
        return (self.levels - 1).bit_length()

    def client_seed(self, round_seed: int, client: int) -> int:
        """Return ``n q + client % n``: the clients of a round share q."""
        return (
            random.derive(round_seed, "correlated") >> 31
        ) * self.clients + client % self.clients

    def max_body_bytes(self, layout: Layout) -> int:
        """Scales and packed codes."""
        groups = group_sizes(layout, self.scale, self.bucket).size
        return 4 * groups + packed_bytes(layout.size, self._bits)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        sizes = group_sizes(layout, self.scale, self.bucket)
        scales = largest(x, sizes)
        m = spread(scales, sizes)
        first, step, centre = self._grid(x.size, seed)
        t = (x / np.where(m > 0, m, 1.0) + 1) / 2
        code = np.floor((t - first) / step + self._thresholds(x.size, seed))
        codes = np.where(m > 0, np.clip(code, 0, self.levels - 1), centre).astype(np.int32)
        return floats_bytes(scales) + _integers.encode(
            codes, layout, self._bits, entropy=self.entropy, centre=centre
        )

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        sizes = group_sizes(layout, self.scale, self.bucket)
        scales, body = read_scales(body, sizes.size)
        first, step, centre = self._grid(layout.size, seed)
        codes = _integers.decode(body, layout, self._bits, entropy=self.entropy, centre=centre)
        y = np.empty(layout.size, np.float32)
        for part, m in pieces(scales, sizes):
            if (codes[part] >= self.levels).any() or (codes[part] != centre[part])[m == 0].any():
                raise DecodeError("a code is out of range")
            y[part] = to_float32(m * (2 * (first[part] + codes[part] * step) - 1))
        return y

    def _grid(self, d: int, seed: int) -> tuple[Wide, float, NDArray[np.int32]]:
        """Return the first level, the step, and the level nearest zero: the same for a round."""
        k = self.levels
        if k == 2:
            first, step = np.zeros(d), 1.0
        else:
            first = fractions(seed // self.clients, d, "correlated/levels") / -k
            step = (k + 1) / (k * (k - 1))
        return first, step, np.floor((0.5 - first) / step + 0.5).astype(np.int32)

    def _thresholds(self, d: int, seed: int) -> Wide:
        """Return what is added before rounding down, (d,) uniform in (0, 1)."""
        n = self.clients
        shared, rank = divmod(seed, n)
        place = int(np.argsort(random.words(shared, n, "correlated/order"), kind="stable")[rank])
        turn = random.words(shared, d, "correlated/turn").astype(np.uint64) * np.uint64(n)
        slot = ((turn >> np.uint64(32)) + np.uint64(place)) % np.uint64(n)
        thresholds: Wide = (slot + fractions(seed, d, "correlated/own")) / n
        return thresholds
