"""An honest but curious server: a grid that shows what it sees, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fedq import records, wire
from fedq.codecs.base import decode
from fedq.codecs.identity import Identity
from fedq.engines.stream import WrappedGrid
from fedq.errors import DecodeError
from fedq.layout import Layout, Vector

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import Message
from flwr.serverapp import Grid


@dataclass(frozen=True)
class Seen:
    """One round as its server sees it.

    Attributes:
      round: From 1.
      weights: (d,) float32, the global model that clients were sent, as they decode it.
      state: (s,) float32, what goes beside the weights.
      deltas: By client, its (d,) float32 update as the server decodes it.
    """

    round: int
    weights: Vector
    state: Vector
    deltas: dict[int, Vector] = field(default_factory=dict)


class Recorder(WrappedGrid):
    """Wraps a grid and hands each round to a callback when all replies are in.

    It opens whole models only: run it with ``downlink_history=0``. Masked, sealed or otherwise
    unreadable replies are no updates that a server sees, and are left out.

    Args:
      grid: Where clients are.
      layout: Names and shapes of the weights.
      state_layout: Names and shapes of the state.
      see: Called with each round.
    """

    def __init__(
        self, grid: Grid, layout: Layout, state_layout: Layout, see: Callable[[Seen], None]
    ) -> None:
        super().__init__(grid)
        self._layout, self._state_layout, self._see = layout, state_layout, see

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield the replies as they come."""
        asked = list(messages)
        seen = self._opened(asked[0]) if asked else None
        for reply in self._grid.send_and_receive(asked, timeout=timeout):
            if seen is not None:
                self._note(reply, seen)
            yield reply
        if seen is not None:
            self._see(seen)

    def _opened(self, request: Message) -> Seen | None:
        try:
            message = wire.unseal(records.unpack(request.content))
            weights = decode(message.parts[0], self._layout)
            state = Identity().decode(message.parts[1], self._state_layout)
            return Seen(int(message.metadata["round"]), weights, state)
        except (DecodeError, LookupError):
            return None

    def _note(self, reply: Message, seen: Seen) -> None:
        if reply.has_error():
            return
        try:
            message = wire.unseal(records.unpack(reply.content))
            delta = decode(message.parts[0], self._layout)
            seen.deltas[int(message.metadata["client"])] = delta
        except (DecodeError, LookupError):
            return
