"""Replies one by one from any Flower grid: Flower's own grids return them all at once.

Flower builds the records of a reply while it is pulled, as its sender describes them. What cannot
be built, or not within the process's memory, costs its sender's update: each reply is pulled alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fedq.records import UNREADABLE

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError
from flwr.supercore.run import Run

if TYPE_CHECKING:
    from fedq.asynchronous import Arrival

POLL_S = 0.1
#: What Flower raises while it builds a peer's records, and no connection raises.
UNBUILDABLE = (
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    UnexpectedObjectContentError,
    ValueError,
)


class WrappedGrid(Grid):
    """A grid around another; subclasses say what differs, at least how messages are exchanged.

    Args:
      grid: Any grid.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Set the run of the wrapped grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the wrapped grid."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def buffered(self, arrivals: Iterator[Arrival], step: int) -> Iterator[Arrival]:
        """Return what the server finds in the buffer of one step, in the same order."""
        inner = self._grid
        return inner.buffered(arrivals, step) if isinstance(inner, WrappedGrid) else arrivals

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the wrapped grid."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes of the wrapped grid."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push through the wrapped grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull through the wrapped grid."""
        return self._grid.pull_messages(message_ids)


class StreamGrid(WrappedGrid):
    """Wraps a grid so that ``send_and_receive`` yields each reply when it is there.

    Args:
      grid: Any grid, e.g. the one that Flower hands to a ServerApp.
    """

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield replies as they come, until all are in or time is up."""
        asked = list(messages)
        pushed = zip(self._grid.push_messages(asked), asked, strict=False)
        waiting = {identifier: message for identifier, message in pushed if identifier}
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting and (deadline is None or time.monotonic() < deadline):
            start, found = time.monotonic(), 0
            for identifier in list(waiting):
                for reply in self._pull(identifier, waiting[identifier]):
                    found += 1
                    yield reply
                    waiting.pop(identifier, None)
            if waiting and not found:
                # At most half of the time goes to asking, however many are waited for.
                time.sleep(max(POLL_S, time.monotonic() - start))

    def _pull(self, identifier: str, message: Message) -> list[Message]:
        """Return the reply to a message if it is there, an error in its place if it is unusable."""
        try:
            return list(self._grid.pull_messages([identifier]))
        except UNBUILDABLE as error:
            reason = f"its records cannot be built: {type(error).__name__}: {error}"
            return [Message(Error(UNREADABLE, reason), reply_to=message)]
