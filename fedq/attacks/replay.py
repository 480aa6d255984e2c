"""Replay: an earlier reply again."""

from __future__ import annotations

from fedq import wire
from fedq.attacks.base import Honest, PayloadAttack, View, resealed
from fedq.registry import register


@register("attack", "replay")
class Replay(PayloadAttack):
    """Send the reply of the last round in which the client took part; the first one is honest.

    Args:
      fraction: Of clients that are hostile.
      renumber: Whether to write the present round into it.
    """

    fraction: float = 0.2
    renumber: bool = True

    def _rewrite(self, reply: Honest, view: View) -> bytes:
        before = view.earlier.get(reply.client)
        if before is None or not self.renumber:
            return before or wire.seal(reply.message)
        return resealed(reply, bytes(wire.unseal(before).parts[0]))
