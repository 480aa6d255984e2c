"""The grid of a run on a fleet: Flower's, but no device can hold up the others.

Flower's grid stays with a reply whose upload is under way until it is complete or the SuperLink
gives it up, three minutes after its last piece: a device that is cut off while it sends would hold
up all replies, and the round's deadline.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from fedq.fleet import flower

# isort: split
from flwr.app import Message
from flwr.superlink.grid.http_grid import HttpGrid


class FleetGrid(HttpGrid):
    """Flower's grid; a reply that is still on its way is asked for again.

    Args:
      address: Of the SuperLink's runtime API.
      certificate: Of the authority that signed the SuperLink's, PEM.
      token: Of the run's ServerApp.
    """

    #: Replies that the SuperLink has announced, which it does once, by the message they answer.
    _announced: dict[str, tuple[flower.ProtoMessage, flower.ObjectTree]]

    def __init__(self, address: str, certificate: bytes, token: str) -> None:
        super().__init__(address, False, certificate, token=token)
        self._announced = {}

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived; those that never will are errors."""
        wanted = list(message_ids)
        if new := [identifier for identifier in wanted if identifier not in self._announced]:
            request = flower.PullAppMessagesRequest(message_ids=new)
            found = self._runtime_client.PullMessages(request)
            pairs = zip(found.messages_list, found.message_object_trees, strict=True)
            for header, tree in pairs:
                self._announced[header.metadata.reply_to_message_id] = (header, tree)
        replies = []
        for identifier in wanted:
            if identifier not in self._announced:
                continue
            reply = self._pull(*self._announced[identifier])
            if reply is not None:
                del self._announced[identifier]
                replies.append(reply)
        return replies

    def _pull(self, header: flower.ProtoMessage, tree: flower.ObjectTree) -> Message | None:
        """Return an announced reply, None as long as a part of it is missing."""
        contents: dict[str, bytes] = {}
        # Devices send the root last: as long as it is missing, nothing else is asked for.
        for part in reversed(list(flower.iterate_object_tree(tree))):
            request = flower.PullObjectRequest(
                node=self.node, run_id=self.run.run_id, object_id=part.object_id
            )
            found = self._runtime_client.PullObject(request)
            if not found.object_found:
                return flower.lost_reply(header, "its upload broke off and was not resumed")
            if not found.object_available:
                return None
            contents[part.object_id] = found.object_content
        self._runtime_client.ConfirmMessageReceived(
            flower.ConfirmMessageReceivedRequest(
                node=self.node, run_id=self.run.run_id, message_object_id=tree.object_id
            )
        )
        message = cast(Message, flower.inflate_object_from_contents(tree.object_id, contents))
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message
