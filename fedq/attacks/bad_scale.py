"""Scales that are no numbers: NaN, infinity, zero, negative, denormal."""

from __future__ import annotations

import numpy as np

from fedq import wire
from fedq.attacks.base import Honest, PayloadAttack, View, resealed
from fedq.registry import register

VALUES = (np.nan, np.inf, -np.inf, -1.0, -0.0, 1e-45, 3.4e38)


@register("attack", "bad_scale")
class BadScale(PayloadAttack):
    """Overwrite the head of the body, where most codecs keep scales, with floats that are none.

    Args:
      fraction: Of clients that are hostile.
    """

    fraction: float = 0.2

    def _rewrite(self, reply: Honest, view: View) -> bytes:
        frame = wire.open_frame(reply.message.parts[0], view.layout)
        value = np.array(view.rng.choice(VALUES), "<f4").tobytes()
        body = (value + bytes(frame.body[len(value) :]))[: len(frame.body)]
        return resealed(reply, wire.seal_frame(frame.codec, view.layout, frame.seed, body))
