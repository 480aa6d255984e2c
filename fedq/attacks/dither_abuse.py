"""Abuse of rounding: a bias of the size of the codec's own noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.attacks.base import Attack, Honest, View, deltas_of, encoded, moments, sealed
from fedq.codecs.base import decode
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "dither_abuse")
class DitherAbuse(Attack):
    """Move every coordinate against the honest mean by a step of the codec's grid.

    Who encodes knows the seed, and so what decoding will add. Honest rounding errors cancel in a
    mean; these all point one way, at sizes that the server must allow for: the coarser the codec,
    the more there is to hide in. The step is taken for ``sqrt(12)`` times the root mean square
    error, as on a uniform grid.

    Args:
      fraction: Of clients that are hostile.
      factor: Of a step.
    """

    fraction: float = 0.2
    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factor > 0:
            raise ConfigError(f"attack.factor must be positive, not {self.factor}")

    def forge(self, view: View) -> list[bytes]:
        """Return the own updates, biased."""
        own, others = deltas_of(view)
        mean, _ = moments(others, own)
        return [
            sealed(view, reply, delta - self.factor * _step(view, reply, mean) * np.sign(mean))
            for reply, delta in zip(view.own, own, strict=True)
        ]


def _step(view: View, reply: Honest, mean: NDArray[np.float64]) -> float:
    """Return the step at which a reply's like is coded: halfway to the mean is off its grid."""
    x = (reply.delta + mean) / 2
    error = decode(encoded(view, reply, x), view.layout) - x
    return float(np.sqrt(12 * np.square(error).mean()))
