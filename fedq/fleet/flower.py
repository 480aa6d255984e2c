"""What Flower keeps to itself and a fleet needs: the only module here that reaches for it.

Flower's public interface to a deployment is its command line. A device that is one process, a
server that answers devices and administrators on different sockets, and a run that outlives the
server need the pieces below it. They are those of Flower 1.41, which ``pyproject.toml`` pins.
"""

from __future__ import annotations

import base64
import datetime
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from google.protobuf.message import DecodeError as ProtobufError

from fedq import records  # noqa: F401  (sets what Flower reads at import)
from fedq.errors import FedqError

# isort: split
from flwr.app import Error, Message, Metadata
from flwr.app.message import array, make_message, remove_content_from_message
from flwr.common.constant import (
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
    SubStatus,
)
from flwr.common.serde import (
    context_from_proto,
    fab_to_proto,
    message_from_proto,
    message_to_proto,
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    SYSTEM_MESSAGE_TYPE,
    TaskType,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    verify_signature,
)
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

KNOWN = "1.41."

__all__ = [
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "AcquireTaskRequest",
    "ActivateNodeRequest",
    "ConfirmMessageReceivedRequest",
    "ControlHttpClient",
    "DeactivateNodeRequest",
    "ErrorCode",
    "Fab",
    "FleetHttpClient",
    "FlowerError",
    "GetRunRequest",
    "ListNodesRequest",
    "Node",
    "NodeAuthHttpInterceptor",
    "ObjectTree",
    "ProtoMessage",
    "ProtobufError",
    "ProtobufRequestContext",
    "PullAppMessagesRequest",
    "PullMessagesRequest",
    "PullMessagesResponse",
    "PullObjectRequest",
    "PullTaskInputRequest",
    "PushMessagesRequest",
    "PushObjectRequest",
    "PushTaskOutputRequest",
    "RegisterNodeRequest",
    "RuntimeHttpClient",
    "RuntimeTokenHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "SendNodeHeartbeatRequest",
    "SendTaskHeartbeatRequest",
    "StartRunRequest",
    "StopRunRequest",
    "SubStatus",
    "TaskIdentity",
    "TaskType",
    "UnregisterNodeRequest",
    "asking_node",
    "context_from_proto",
    "destinations",
    "fab_to_proto",
    "get_all_nested_objects",
    "get_object_tree",
    "inflate_object_from_contents",
    "iterate_object_tree",
    "lost_reply",
    "message_from_proto",
    "message_to_proto",
    "no_object_id_recompute",
    "public_key_to_bytes",
    "remove_content_from_message",
    "require_known",
    "run_from_proto",
    "set_chunk_bytes",
    "signed_by",
    "superlink_app",
    "user_config_to_proto",
]


def require_known() -> None:
    """Refuse to go on with another Flower than this module was written for."""
    found = version("flwr")
    if not found.startswith(KNOWN):
        raise FedqError(
            f"this fedq needs flwr {KNOWN}x for a fleet, not {found}; pip install 'flwr~={KNOWN}0'"
        )


def lost_reply(header: ProtoMessage, reason: str) -> Message:
    """Return the error that stands for a reply of which no more than its header has come."""
    asked = header.metadata
    metadata = Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.src_node_id,
        dst_node_id=asked.dst_node_id,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id=asked.group_id,
        ttl=0,
        reply_to_message_id=asked.reply_to_message_id,
        created_at=now().timestamp(),
    )
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))


def destinations(body: bytes) -> list[int]:
    """Return the nodes that a run's request to push messages names."""
    pushed = PushAppMessagesRequest.FromString(body)  # Flower has accepted it
    return [message.metadata.dst_node_id for message in pushed.messages_list]


def asking_node(body: bytes) -> int:
    """Return the node that asks for messages, or confirms one: both say it in the same field."""
    return int(PullMessagesRequest.FromString(body).node.node_id)


def signed_by(headers: Mapping[str, str]) -> bytes | None:
    """Return the public key of who signed a request's time, just now, as nodes do; None if nobody.

    Flower checks this itself on its own routes.
    """
    try:
        key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower()], validate=True)
        signature = base64.b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.lower()], validate=True)
        time = headers[TIMESTAMP_HEADER.lower()]
        age_s = (now() - datetime.datetime.fromisoformat(time)).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age_s < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return None
        public = bytes_to_public_key(key)
        return key if verify_signature(public, time.encode("ascii"), signature) else None
    except (KeyError, ValueError, TypeError):  # binascii's and Unicode's are ValueErrors
        return None


def set_chunk_bytes(size: int) -> None:
    """Have arrays that are sent from now on cut into pieces of at most so many bytes."""
    array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE = size  # type: ignore[attr-defined]


def superlink_app(arguments: list[str]) -> Any:
    """Return Flower's SuperLink, an ASGI application, with the options of its own command."""
    from flwr.superlink.cli.flower_superlink import (
        SuperLinkLifespan,
        _parse_superlink_lifespan_config,
    )
    from flwr.superlink.main import create_app

    given, sys.argv = sys.argv, ["flower-superlink", *arguments]
    try:
        return create_app(_parse_superlink_lifespan_config(), SuperLinkLifespan)
    finally:
        sys.argv = given
