"""Random blocks of coordinates at the rate that pays best (Konecny et al. 2016, random mask)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import random, wire
from fedq.codecs._groups import scaled
from fedq.codecs._rate import Goal, SteppedCodec
from fedq.codecs._scales import Profile
from fedq.codecs.base import Codec
from fedq.codecs.dtcq import DTCQ
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

_BLOCK = 64


@register("codec", "subset")
class Subset(Codec):
    """Send a seeded share p of all blocks of 64 coordinates through ``inner``, divided by p.

    An unbiased code of rate R and error U (relative to ``|x|^2``) becomes one of rate p R and error
    ``(1 + U) / p - 1``: what counts is the product ``R (1 + U)``, and below the rate where that is
    least it is better to send fewer blocks than to send them worse. With ``bits``, a codec with a
    step is run at this rate; another one at its own.

    ``dtcq`` samples by itself, and better, as its scales say which coordinates matter. This is for
    codecs that do not.

    Body: number of blocks sent, varint; body of ``inner`` for their coordinates, in order.

    Args:
      bits: Target in bits per parameter; chooses the share.
      fraction: The share itself, in (0, 1]; takes the place of ``bits``.
      inner: Codec of the coordinates that are sent.

    Example:
      >>> from fedq.registry import build
      >>> layout = Layout.flat(6400)
      >>> codec = build("codec", "subset", fraction=0.25, inner="identity")
      >>> y = codec.decode(codec.encode(np.ones(6400), layout, seed=1), layout)
      >>> (y == 4).sum().item(), (y == 0).sum().item()
      (1600, 4800)

    Reference:
      Konecny et al. 2016, "Federated learning: strategies for improving communication efficiency",
      section 2 (random mask).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"fraction": 0.7, "inner": "ternary"},
        {"bits": 1.5},
    )

    bits: float = 0.1
    fraction: float = 0.0
    inner: Codec = DTCQ(sampling=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fraction <= 1:
            raise ConfigError(f"codec.fraction must be in (0, 1], not {self.fraction}")
        if not self.fraction and not 0 < self.bits <= 16:
            raise ConfigError("set codec.bits, up to 16 per parameter, or codec.fraction")
        if not self.fraction and not getattr(self.inner, "bits", 0):
            raise ConfigError(f"{self.inner.name} has no rate of its own: set codec.fraction")

    @property
    def unbiased(self) -> bool:
        """Whether ``inner`` is."""
        return self.inner.unbiased

    def max_body_bytes(self, layout: Layout) -> int:
        """The count, and ``inner``'s bound for all coordinates."""
        return 10 + self.inner.max_body_bytes(Layout.flat(layout.size))

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        blocks = _blocks(layout)
        if not blocks:
            return wire.varint(0)
        goal, share = None, self.fraction
        if not share:
            header = 8 * len(wire.seal_frame(self, layout, seed, b""))
            goal = Goal(bits=max(self.bits * x.size - header, self.bits * x.size / 2))
            assert goal.bits is not None
            share = goal.bits / x.size / self._best_rate(x)
        sent = min(blocks, max(1, round(share * blocks)))
        count = wire.varint(sent)
        part = x[_mask(layout, sent, seed)]
        inner_seed = random.derive(seed, "subset", "inner")
        if goal is not None and isinstance(self.inner, SteppedCodec):
            body = self.inner._encode_to(
                part, Layout.flat(part.size), inner_seed, goal.less(len(count))
            )
        else:
            body = self.inner._encode(part, Layout.flat(part.size), inner_seed)
        return count + body

    def _best_rate(self, x: Vector) -> float:
        """Return the bits per coordinate at which ``R (1 + U)`` is least."""
        if not isinstance(self.inner, SteppedCodec):
            return float(getattr(self.inner, "bits", 1.0))
        power = float(np.square(x, dtype=np.float64).sum())
        if not power:
            return 1.0
        forecast = self.inner._forecast(Profile(x, Layout.flat(x.size)))
        steps = np.sqrt(power / x.size) * 2.0 ** np.arange(-3, 4, 0.25)
        found = [forecast(float(step)) for step in steps]
        return min((bits * (1 + error / power), bits) for bits, error in found)[1] / x.size

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        reader = wire.Reader(body)
        sent, blocks = reader.varint(), _blocks(layout)
        if not min(blocks, 1) <= sent <= blocks:
            raise DecodeError(f"{sent} of {blocks} blocks")
        y = np.zeros(layout.size, np.float32)
        if not blocks:
            reader.end()
            return y
        mask = _mask(layout, sent, seed)
        inner = Layout.flat(int(np.count_nonzero(mask)))
        rest = reader.rest()
        if len(rest) > self.inner.max_body_bytes(inner):
            raise DecodeError(f"payload is too long for {inner.size} coordinates")
        part = self.inner._decode(rest, inner, random.derive(seed, "subset", "inner"))
        y[mask] = scaled(part, blocks / sent)
        return y


def _blocks(layout: Layout) -> int:
    return -(-layout.size // _BLOCK)


def _mask(layout: Layout, sent: int, seed: int) -> NDArray[np.bool_]:
    """Return which coordinates are sent, (d,): those of the blocks with the least random words."""
    order = np.argsort(random.words(seed, _blocks(layout), "subset"), kind="stable")
    chosen = np.zeros(order.size, np.bool_)
    chosen[order[:sent]] = True
    return np.repeat(chosen, _BLOCK)[: layout.size]
