"""What a server takes of its clients' replies: one that fails a check only loses itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedq import records, wire
from fedq.codecs.base import Codec, decode_frame
from fedq.codecs.identity import Identity
from fedq.errors import DecodeError
from fedq.guard import RejectedError
from fedq.layout import Vector
from fedq.privacy.base import Contribution
from fedq.random import round_seed
from fedq.rounds import ServerRound, Update

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import Message

if TYPE_CHECKING:
    from fedq.strategy import FedQ

#: Beyond any sane loss; sums of such losses stay finite.
MAX_LOSS = 1e30
#: Far beyond any sane update, and within what the exact sum of the mean can hold.
MAX_ABSOLUTE = 2.0**14
_HEADS_BYTES = 4096  # more than heads, specifications and lengths of a reply


class Replies:
    """Opens, checks and decodes the replies of one round.

    Args:
      strategy: Who asked for them.
      current: The round; it learns who answered, who is which client and who holds which model.
    """

    def __init__(self, strategy: FedQ, current: ServerRound) -> None:
        self._strategy, self._current = strategy, current

    def updates(self, replies: Iterable[Message]) -> Iterator[Update]:
        """Yield the updates that are worth decoding; the report counts the others."""
        for reply in replies:
            try:
                yield self.open(reply)
            except RejectedError as error:
                self._current.watch.note(reply.metadata.src_node_id, error.kind)
                self._current.report.reject(error.kind, str(error))

    def open(self, reply: Message) -> Update:
        """Check one reply; whatever makes it unusable is a RejectedError."""
        node, slot, message = self.read(reply)
        try:
            return self._update(node, slot, message)
        except DecodeError as error:
            raise RejectedError("malformed", str(error)) from None

    def read(self, reply: Message) -> tuple[int, int, wire.Envelope]:
        """Return who replied, its place in the cohort and what it said in this round."""
        current, report = self._current, self._current.report
        if reply.has_error():
            current.answer(reply)
            kind = records.KINDS.get(reply.error.code, "error")
            raise RejectedError(kind, str(reply.error.reason))
        try:
            blob = records.unpack(reply.content)
        except DecodeError as error:
            current.answer(reply)
            raise RejectedError("malformed", str(error)) from None
        report.received += 1
        report.uplink_bytes += len(blob)
        node, slot = current.answer(reply)
        if slot is None:
            raise RejectedError("unexpected", f"node {node} was not asked, or answered twice")
        asked = current.asked[node]
        if len(blob) > (most := self._most_bytes(asked.codec)):
            raise RejectedError("malformed", f"{len(blob)} bytes; a reply has at most {most}")
        try:
            sealer = None
            if current.openers is not None:
                sealer, blob = current.openers[node].open(blob, len(blob))
            message = wire.unseal(blob)
            metadata = message.metadata
            if sealer is not None and metadata.get("client", sealer) != sealer:
                raise DecodeError(f"client {sealer} seals as client {metadata.get('client')}")
            if metadata.get("round") != asked.round:
                raise RejectedError("stale", f"update of round {metadata.get('round')!r}")
            self._note_base(node, metadata)
            return node, slot, message
        except DecodeError as error:
            raise RejectedError("malformed", str(error)) from None

    def decode(self, update: Update) -> tuple[NDArray[Any], Vector]:
        """Return an update's delta (or integers) and state; safe in several threads."""
        strategy, privacy = self._strategy, self._current.privacy
        delta: NDArray[Any]
        try:
            if isinstance(update.delta, wire.Frame):
                delta = privacy.received(self._decoded(update.delta, update.beside))
            else:
                delta = privacy.unpack(update.delta, self._current.about)
            state = Identity().decode(update.state, strategy.state_layout)
        except DecodeError as error:
            raise RejectedError("malformed", str(error)) from None
        for values in (state,) if privacy.integers else (delta, state):
            if values.size and max(values.max(), -values.min()) >= MAX_ABSOLUTE:
                raise RejectedError("out of range", f"a coordinate exceeds {MAX_ABSOLUTE}")
        return delta, state

    def _most_bytes(self, codec: Codec) -> int:
        """Return more than any reply is long; what is no codec's has its own exact length."""
        strategy = self._strategy
        if strategy.privacy.integers or strategy.secure is not None:
            codec = Identity()
        body = 2 * codec.max_body_bytes(strategy.layout)
        values = np.zeros(strategy.state_layout.size, np.float32)
        state = len(Identity().encode(values, strategy.state_layout))
        return body + state + wire.MAX_METADATA_BYTES + _HEADS_BYTES

    def _note_base(self, node: int, metadata: Mapping[str, Any]) -> None:
        current, kept = self._current, metadata.get("kept")
        if kept is True:
            current.held[node] = current.asked[node].round
        elif kept is False:
            if current.held.pop(node, None) is None:
                current.strangers.add(node)
            raise RejectedError("no base", str(metadata.get("dropped")))

    def _update(self, node: int, slot: int, message: wire.Envelope) -> Update:
        strategy, current, metadata = self._strategy, self._current, message.metadata
        if "dropped" in metadata:
            raise RejectedError("dropped", str(metadata["dropped"]))
        examples, loss = metadata.get("examples"), metadata.get("loss")
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
            raise DecodeError(f"claims {examples!r} examples")
        number = isinstance(loss, int | float) and not isinstance(loss, bool)
        if loss is not None and not (number and abs(loss) <= MAX_LOSS):
            raise DecodeError("claims a loss that is no sane number")
        if len(message.parts) != 2:
            raise DecodeError(f"{len(message.parts)} parts instead of 2")
        within = metadata.get("within")
        if current.privacy.asks_within != isinstance(within, bool):
            raise DecodeError(f"says {within!r} of its clipping")
        beside = current.context.claim(node, metadata.get("context"))
        if beside is not None and current.support is not None:
            beside = current.support.gather(beside)
        delta: wire.Frame | bytes | memoryview = message.parts[0]
        if current.privacy.integers:
            client = current.claims.claim(node, metadata.get("client"))
        else:
            delta, client = self._frame(node, message, beside)
        if strategy.weighting == "registered":
            examples = current.watch.registered(client, examples)
        weight = 1.0
        if strategy.weighting != "uniform":
            weight = float(min(examples, strategy.max_examples))
        loss = None if loss is None or current.privacy.unit else float(loss)
        source = Contribution(client, examples, within)
        variant = metadata.get("variant", 0)
        if type(variant) is not int or not 0 <= variant < len(strategy.variants):
            raise DecodeError(f"claims to be of variant {variant!r}")
        discount = strategy.pacing.discount(current.report.round - current.asked[node].round)
        return Update(
            node, slot, delta, message.parts[1], weight, loss, source, beside, variant, discount
        )

    def _frame(
        self, node: int, message: wire.Envelope, beside: Vector | None
    ) -> tuple[wire.Frame, int]:
        """Return a codec's frame, and the number of the client whose seed it has."""
        current, asked = self._current, self._current.asked[node]
        layout = self._strategy.layout if current.support is None else current.support.layout
        frame = wire.open_frame(message.parts[0], layout, beside)
        if frame.codec != asked.codec:  # another width could be longer than float32
            raise DecodeError(f"encoded by {frame.codec} where {asked.codec} was asked for")
        client = current.claims.claim(node, message.metadata.get("client"))
        seed = round_seed(self._strategy.seed, asked.round)
        if frame.seed != asked.codec.client_seed(seed, client):
            raise RejectedError("seed", f"not the one of client {client} in this round")
        return frame, client

    def _decoded(self, frame: wire.Frame, beside: Vector | None) -> Vector:
        if (support := self._current.support) is None:
            return decode_frame(frame, self._strategy.layout, beside)
        return support.scatter(decode_frame(frame, support.layout, beside))
