"""Flipped bits under a right checksum: codes off the grid, broken entropy coding."""

from __future__ import annotations

from fedq import wire
from fedq.attacks.base import Honest, PayloadAttack, View, resealed
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "bit_flip")
class BitFlip(PayloadAttack):
    """Flip random bits of the body, and seal it again.

    Args:
      fraction: Of clients that are hostile.
      bits: Flipped per reply.
    """

    fraction: float = 0.2
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 1:
            raise ConfigError(f"attack.bits must be at least 1, not {self.bits}")

    def _rewrite(self, reply: Honest, view: View) -> bytes:
        frame = wire.open_frame(reply.message.parts[0], view.layout)
        body = bytearray(frame.body)
        for place in view.rng.integers(8 * len(body), size=self.bits if body else 0).tolist():
            body[place // 8] ^= 1 << place % 8
        return resealed(reply, wire.seal_frame(frame.codec, view.layout, frame.seed, bytes(body)))
