"""Bombs: messages that ask for more memory or time than they are long."""

from __future__ import annotations

from collections.abc import Callable

from fedq import wire
from fedq.attacks.base import Honest, PayloadAttack, View, resealed
from fedq.registry import register


@register("attack", "bomb")
class Bomb(PayloadAttack):
    """Send one of: endless lengths, nested metadata, a body that is too long, one that is all ones.

    Args:
      fraction: Of clients that are hostile.
    """

    fraction: float = 0.2

    def _rewrite(self, reply: Honest, view: View) -> bytes:
        return BOMBS[int(view.rng.integers(len(BOMBS)))](reply, view)


def _endless_metadata(reply: Honest, view: View) -> bytes:
    return wire._seal(wire.MESSAGE_MAGIC, wire.varint(2**63), b"{}")


def _endless_part(reply: Honest, view: View) -> bytes:
    return wire._seal(wire.MESSAGE_MAGIC, wire.varint(2), b"{}", b"\x01", wire.varint(2**40))


def _nested_metadata(reply: Honest, view: View) -> bytes:
    text = b"[" * wire.MAX_METADATA_BYTES
    return wire._seal(wire.MESSAGE_MAGIC, wire.varint(len(text)), text, b"\x00")


def _long_body(reply: Honest, view: View) -> bytes:
    body = bytes(view.codec.max_body_bytes(view.layout) + 1)
    return resealed(reply, wire.seal_frame(view.codec, view.layout, reply.seed, body))


def _ones(reply: Honest, view: View) -> bytes:
    body = b"\xff" * view.codec.max_body_bytes(view.layout)
    return resealed(reply, wire.seal_frame(view.codec, view.layout, reply.seed, body))


BOMBS: tuple[Callable[[Honest, View], bytes], ...] = (
    _endless_metadata,
    _endless_part,
    _nested_metadata,
    _long_body,
    _ones,
)
