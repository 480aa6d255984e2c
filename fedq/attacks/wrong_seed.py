"""Abuse of dither: a seed of the client's own choice."""

from __future__ import annotations

from fedq.attacks.base import Honest, PayloadAttack, View, resealed
from fedq.registry import register


@register("attack", "wrong_seed")
class WrongSeed(PayloadAttack):
    """Encode the own update with another seed than the one that follows from client and round.

    Who may choose the seed can choose the rounding: of many seeds, the one that decodes best for
    the attacker.

    Args:
      fraction: Of clients that are hostile.
    """

    fraction: float = 0.2

    def _rewrite(self, reply: Honest, view: View) -> bytes:
        seed = reply.seed ^ (1 + int(view.rng.integers(1 << 16)))
        return resealed(reply, view.codec.encode(reply.delta, view.layout, seed))
