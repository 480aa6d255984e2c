"""Replies one by one from any Flower grid: Flower's own grids return them all at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from fedq import records  # noqa: F401  (sets what Flower reads at import)

# isort: split
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

POLL_S = 0.1
#: Replies held in memory at once; each pull inflates whatever it asks for.
BATCH = 4


class StreamGrid(Grid):
    """Wraps a grid so that ``send_and_receive`` yields each reply when it is there.

    Args:
      grid: Any grid, e.g. the one that Flower hands to a ServerApp.
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

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield replies as they come, until all are in or time is up."""
        waiting = dict.fromkeys(i for i in self._grid.push_messages(messages) if i)
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting and (deadline is None or time.monotonic() < deadline):
            asked = list(waiting)
            found = 0
            for at in range(0, len(asked), BATCH):
                for reply in self._grid.pull_messages(asked[at : at + BATCH]):
                    waiting.pop(reply.metadata.reply_to_message_id, None)
                    found += 1
                    yield reply
            if waiting and not found:
                time.sleep(POLL_S)
