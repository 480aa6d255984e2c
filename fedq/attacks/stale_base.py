"""Stale bases: an update of an earlier model, coded as one of this round's."""

from __future__ import annotations

from fedq import wire
from fedq.attacks.base import Honest, PayloadAttack, View, sealed
from fedq.codecs.base import decode
from fedq.registry import register


@register("attack", "stale_base")
class StaleBase(PayloadAttack):
    """Send the update of the last round in which the client took part, with this round's seed.

    Nothing about the message is wrong: only its base, which the server cannot see in it. ``replay``
    sends the old bytes, whose seed gives them away.

    Args:
      fraction: Of clients that are hostile.
    """

    fraction: float = 0.2

    def _rewrite(self, reply: Honest, view: View) -> bytes:
        before = view.earlier.get(reply.client)
        if before is None:
            return wire.seal(reply.message)
        return sealed(view, reply, decode(wire.unseal(before).parts[0], view.layout))
