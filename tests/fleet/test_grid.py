"""Replies of a fleet: those that have come do not wait for one that is still on its way."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedq.fleet import flower
from fedq.fleet.grid import FleetGrid

# isort: split
from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.run import Run


class SuperLink:
    """Announces each reply once, as Flower's does, and hands out what has been stored."""

    def __init__(self) -> None:
        self.announced: dict[str, Message] = {}
        self.stored: dict[str, bytes] = {}
        self.known: set[str] = set()
        self.pulled: list[str] = []
        self.confirmed: list[str] = []

    def announce(self, asked: str, reply: Message) -> dict[str, bytes]:
        """Take a reply's header; return its objects in the order in which devices send them."""
        reply.metadata.__dict__.update(_message_id=reply.object_id, _reply_to_message_id=asked)
        objects = {
            object_id: part.deflate()
            for object_id, part in flower.get_all_nested_objects(reply).items()
        }
        self.announced[asked] = reply
        self.known |= set(objects)
        return objects

    def PullMessages(self, request: Any) -> Any:
        replies = [self.announced.pop(i) for i in request.message_ids if i in self.announced]
        return PullAppMessagesResponse(
            messages_list=[
                flower.message_to_proto(remove_content_from_message(reply)) for reply in replies
            ],
            message_object_trees=[flower.get_object_tree(reply) for reply in replies],
        )

    def PullObject(self, request: Any) -> Any:
        self.pulled.append(request.object_id)
        return PullObjectResponse(
            object_found=request.object_id in self.known,
            object_available=request.object_id in self.stored,
            object_content=self.stored.get(request.object_id, b""),
        )

    def ConfirmMessageReceived(self, request: Any) -> Any:
        self.confirmed.append(request.message_object_id)


def reply_of(value: float) -> Message:
    weights = ArrayRecord({"w": Array(np.full(5, value, np.float32))})
    metadata = Metadata(3, "", 7, 1, "", "", 0.0, 60.0, "train")
    return make_message(metadata, RecordDict({"weights": weights}))


def values(message: Message) -> list[float]:
    return list(message.content["weights"]["w"].numpy())


def grid_of(superlink: SuperLink) -> FleetGrid:
    grid = FleetGrid("127.0.0.1:1", b"", "token")
    grid._client = superlink
    grid.set_run(Run.create_empty(3))
    return grid


def test_a_reply_on_its_way_holds_up_no_other_and_no_deadline() -> None:
    superlink = SuperLink()
    grid = grid_of(superlink)
    slow = superlink.announce("a", reply_of(1.0))
    superlink.stored |= superlink.announce("b", reply_of(2.0))
    *pieces, root = slow
    for piece in pieces:  # whatever has come but the last
        superlink.stored[piece] = slow[piece]
        superlink.pulled.clear()
        assert [values(reply) for reply in grid.pull_messages(["a", "b"])] in ([[2.0] * 5], [])
        assert superlink.pulled[0] == root
        assert not set(superlink.pulled) & set(pieces), "pulled in vain"
    superlink.stored[root] = slow[root]
    [reply] = grid.pull_messages(["a"])
    assert values(reply) == [1.0] * 5
    assert reply.metadata.reply_to_message_id == "a"
    assert superlink.confirmed[-1] == root
    assert grid.pull_messages(["a", "b"]) == []


def test_an_upload_that_broke_off_is_an_error_in_its_sender_s_place() -> None:
    superlink = SuperLink()
    grid = grid_of(superlink)
    superlink.announce("a", reply_of(1.0))
    assert grid.pull_messages(["a"]) == []
    superlink.known.clear()  # the SuperLink gives up three minutes after the last piece
    [lost] = grid.pull_messages(["a"])
    assert lost.has_error()
    assert lost.error.code == flower.ErrorCode.MESSAGE_UNAVAILABLE
    assert "broke off" in lost.error.reason
    assert lost.metadata.reply_to_message_id == "a"
    assert lost.metadata.src_node_id == 7
    assert grid.pull_messages(["a"]) == []
