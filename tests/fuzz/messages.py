"""Hostile replies at the server: message, frame, decoder, checks and guard.

For every codec example there is a server in the middle of a round, and an honest reply. A hostile
one is that reply with bytes of its body changed, or of its message, or with other metadata, sealed
again with the right checksums most of the time. It must be rejected by name, or be a finite update
within the guard's limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedq import records, wire
from fedq.client import Task
from fedq.codecs import Codec
from fedq.guard import RejectedError, Watch
from fedq.layout import Layout
from fedq.registry import build, table
from fedq.replies import Replies
from fedq.strategy import FedQ
from tests import fuzz
from tests.grids import InlineGrid

# isort: split
from flwr.app import Message

STATE = Layout.flat(2)
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**64, 10**400, 1.5, 1e300, "x" * 300, [], {}, [[[]]], "\x1b[31m"),
)
_KEYS = ("round", "client", "examples", "loss", "kept", "context", "dropped", "other")


@dataclass
class Target:
    """A server that waits for one client's reply."""

    strategy: FedQ
    current: Any
    request: Message
    honest: wire.Envelope

    @classmethod
    def of(cls, codec: Codec) -> Target:
        """Begin a round with a codec on the richest layout."""
        layout = fuzz.LAYOUTS[0]

        def answer(message: Message, partition: int) -> Message:
            delta = fuzz.vector(layout, "x")
            if codec.outermost:  # the residual is the client's own affair
                task = Task.open(message, layout, STATE)
                seed = codec.client_seed(fuzz.random.round_seed(0, 1), 0)
                payload = codec.encode(delta, layout, seed)
                state = build("codec", "identity").encode(task.state, STATE)
                metadata = {"round": 1, "client": 0, "examples": 3, "loss": 0.5}
                sealed = wire.seal(wire.Envelope(metadata, [payload, state]))
                return Message(records.pack(sealed), reply_to=message)
            task = Task.open(message, layout, STATE)
            return task.reply(delta, examples=3, client=0, loss=0.5)

        grid = InlineGrid(answer, 1)
        strategy = FedQ(layout=layout, state_layout=STATE, codec=codec)
        # The guard's yardstick; a low rate on few coordinates decodes to much noise.
        weights = fuzz.vector(layout, "x") * np.float32(4096)
        current = strategy._begin(grid, strategy.initial(weights))
        (reply,) = grid.send_and_receive(current.messages)
        target = cls(strategy, current, current.messages[0], wire.unseal(_blob(reply)))
        assert target.accepts(_blob(reply)), codec
        return target

    def accepts(self, blob: bytes) -> bool:
        """Whether the server counts a reply; what is neither refused nor usable is a bug."""
        strategy, current = self.strategy, self.current
        current.waiting = {self.request.metadata.dst_node_id: 0}
        watch: Watch = strategy.guard.watch(current.before.guard, 1, current.before.weights)
        replies = Replies(strategy, current)
        try:
            update = replies.open(Message(records.pack(blob), reply_to=self.request))
            delta, state = replies.decode(update)
            delta = watch.admit(delta, state)
        except RejectedError:
            return False
        assert delta.shape == (strategy.layout.size,)
        assert delta.dtype == np.float32
        assert np.isfinite(delta).all()
        assert np.isfinite(state).all()
        limit = strategy.guard.norm_limit
        assert limit is not None
        assert np.linalg.norm(delta) <= 1.001 * limit * np.linalg.norm(current.before.weights)
        assert 0 < update.weight <= strategy.max_examples
        return True

    def hostile(self, rng: np.random.Generator) -> bytes:
        """Return a reply that no honest client sends."""
        message, kind = self.honest, rng.integers(8)
        if kind == 0:  # what a network may do
            return fuzz.mutated(bytes([0]) + wire.seal(message), rng)[1:]
        metadata, parts = dict(message.metadata), [bytes(part) for part in message.parts]
        if kind == 1:
            metadata[str(rng.choice(_KEYS))] = _VALUES[int(rng.integers(len(_VALUES)))]
        elif kind == 2:
            parts = [parts[i] for i in rng.integers(len(parts), size=rng.integers(4))]
        else:
            which = int(kind == 3)
            start = 7 + 4  # magic, version, checksum; fingerprint
            layout = STATE if which else self.strategy.layout
            content = fuzz.mutated(bytes([0]) + parts[which][start:], rng)[1:]
            parts[which] = wire._seal(wire.FRAME_MAGIC, layout.fingerprint + content)
        return wire.seal(wire.Envelope(metadata, parts))


def _blob(reply: Message) -> bytes:
    return records.unpack(reply.content)


def targets() -> list[tuple[str, Target]]:
    """Return a server for each example of each codec."""
    return [
        (name, Target.of(build("codec", name, **options)))
        for name, cls in table("codec").items()
        for options in cls.examples  # type: ignore[attr-defined]
    ]
