"""Random-k sparsification: a random subset, scaled up (Konecny et al. 2016, Stich et al. 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import random
from fedq.codecs._groups import scaled
from fedq.codecs.base import Codec
from fedq.codecs.identity import Identity
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "random_k")
class RandomK(Codec):
    """Send ``k = max(1, round(fraction d))`` random coordinates; both ends draw the same ones.

    They are decoded as ``d / k`` times what ``inner`` makes of them, the others as zero: unbiased
    if ``inner`` is (to 2**-32 of a coordinate's chance), with ``E|y - x|**2 = (d / k - 1) |x|**2``
    if ``inner`` is exact. Values beyond ``k / d`` of the float32 limit saturate.

    Body: that of ``inner`` for k coordinates. Positions cost nothing.

    Args:
      fraction: Of all coordinates, in (0, 1].
      inner: Codec of the drawn values, in their order.

    Example:
      >>> layout = Layout.flat(4)
      >>> codec = RandomK(fraction=0.5)
      >>> codec.decode(codec.encode(np.ones(4), layout, seed=2), layout)
      array([0., 0., 2., 2.], dtype=float32)

    Reference:
      Konecny et al. 2016, "Federated learning: strategies for improving communication efficiency",
      section 2 (random mask); Stich et al. 2018, "Sparsified SGD with memory", definition 2.1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"fraction": 0.75},
        {"fraction": 0.75, "inner": {"name": "uniform", "bits": 4, "rounding": "dithered"}},
        {"fraction": 1.0, "inner": "fp16"},
    )

    fraction: float = 0.1
    inner: Codec = Identity()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"codec.fraction must be in (0, 1], not {self.fraction}")

    @property
    def unbiased(self) -> bool:
        """Whether ``inner`` is."""
        return self.inner.unbiased

    def max_body_bytes(self, layout: Layout) -> int:
        """``inner``'s bound for k coordinates."""
        return self.inner.max_body_bytes(self._drawn(layout))

    def _drawn(self, layout: Layout) -> Layout:
        d = layout.size
        return Layout.flat(min(d, max(1, round(self.fraction * d))))

    def _mask(self, layout: Layout, seed: int) -> NDArray[np.bool_]:
        """Return which coordinates are drawn, (d,): those of the k least random words."""
        k = self._drawn(layout).size
        word = random.words(seed, layout.size, "random_k")
        if k == layout.size:
            return np.ones(k, np.bool_)
        bound = np.partition(word, k)[k]
        mask: NDArray[np.bool_] = word < bound
        ties = np.flatnonzero(word == bound)
        mask[ties[: k - int(mask.sum())]] = True
        return mask

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        values = x[self._mask(layout, seed)]
        return self.inner._encode(values, self._drawn(layout), _inner_seed(seed))

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        drawn = self._drawn(layout)
        values = self.inner._decode(body, drawn, _inner_seed(seed))
        y = np.zeros(layout.size, np.float32)
        y[self._mask(layout, seed)] = scaled(values, layout.size / max(drawn.size, 1))
        return y


def _inner_seed(seed: int) -> int:
    """Return another seed, lest a ``random_k`` within draws by the same words."""
    return random.derive(seed, "random_k", "inner")
