"""Codes off the grid: the body of a wider codec under the name of the announced one."""

from __future__ import annotations

import dataclasses
from typing import Any

from fedq import wire
from fedq.attacks.base import Honest, PayloadAttack, View, resealed
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "off_grid")
class OffGrid(PayloadAttack):
    """Encode the opposite of the own update with more bits than announced.

    Codes beyond the announced grid come out larger than any honest one where a decoder does not
    check them. For a codec without an option ``bits`` the body is one byte longer instead.

    Args:
      fraction: Of clients that are hostile.
    """

    fraction: float = 0.2

    def _rewrite(self, reply: Honest, view: View) -> bytes:
        codec = _wider(view.codec)
        payload = codec.encode(-reply.delta, view.layout, reply.seed)
        body = bytes(wire.open_frame(payload, view.layout).body)
        if codec == view.codec:
            body += b"\xff"
        named = wire.open_frame(reply.message.parts[0], view.layout).codec
        return resealed(reply, wire.seal_frame(named, view.layout, reply.seed, body))


def _wider(codec: Any) -> Any:
    """Return the codec, or the one inside it, with a bit more; itself if there is none."""
    changes = {}
    if isinstance(getattr(codec, "bits", None), int | float):
        changes = {"bits": codec.bits + 1}
    elif hasattr(codec, "inner"):
        changes = {"inner": _wider(codec.inner)}
    try:
        return dataclasses.replace(codec, **changes)
    except ConfigError:
        return codec
