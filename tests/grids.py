"""Toy grids and clients for tests: a known delta, and every way a client can misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from fedq import records, wire
from fedq.client import Task
from fedq.layout import Layout

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Handler = Callable[[Message, int], Message]


def toy_app(handler: Handler) -> ClientApp:
    """A ClientApp whose nodes call ``handler(message, partition)``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return handler(message, int(context.node_config["partition-id"]))

    return app


def constant_client(layout: Layout) -> Handler:
    """Client i answers with the delta (i + 1, i + 1, ...) and i + 1 examples."""

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, layout)
        delta = np.full(layout.size, partition + 1, np.float32)
        return task.reply(delta, examples=partition + 1, client=partition, loss=partition)

    return handle


@dataclass
class InlineGrid(Grid):
    """Runs ``handler`` in this process; nodes are numbered from 2."""

    handler: Handler
    clients: int
    order: Callable[[list[Message]], list[Message]] = list
    seen: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: object, **options: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(2, 2 + self.clients)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for message in self.order(list(messages)):
            self.seen.append(message)
            yield self.handler(message, message.metadata.dst_node_id - 2)


@dataclass
class CountingGrid(Grid):
    """Counts every byte of content that crosses a grid, in both directions."""

    inner: Grid
    up: int = 0
    down: int = 0

    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        return self.inner.run

    def create_message(self, *args: object, **options: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.inner.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        messages = list(messages)
        self.down += sum(_bytes(message.content) for message in messages)
        for reply in self.inner.send_and_receive(messages, timeout=timeout):
            if reply.has_content():
                self.up += _bytes(reply.content)
            yield reply


def _bytes(content: RecordDict) -> int:
    """Every byte string in every record, found without fedq's help."""
    total = 0
    for record in content.values():
        for value in record.values():
            total += len(value) if isinstance(value, bytes) else len(getattr(value, "data", b""))
    return total


def raw_reply(message: Message, blob: bytes) -> Message:
    """A reply that carries arbitrary bytes."""
    return Message(records.pack(blob), reply_to=message)


def envelope(metadata: dict[str, object], *parts: bytes) -> bytes:
    """A well-formed message of any content."""
    return wire.seal(wire.Envelope(metadata, parts))
