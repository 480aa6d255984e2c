"""The administrator's side of a fleet's server: which devices may take part, and runs."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from fedq.errors import FedqError
from fedq.fleet import flower
from fedq.fleet.files import Fleet
from fedq.fleet.flower import ControlHttpClient
from fedq.fleet.gateway import RELEASED, SEEN

ONLINE = "online"
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class NodeInfo:
    """A registered device as Flower knows it."""

    node_id: int
    public_key: bytes
    status: str
    registered_at: str


@contextmanager
def connected(fleet: Fleet) -> Iterator[ControlHttpClient]:
    """Connect to the control port; what goes wrong there is a :class:`FedqError`."""
    client = ControlHttpClient.from_server_address(
        fleet.control_address,
        False,
        fleet.path("ca.crt").read_bytes(),
        [flower.RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield client
    except httpx.HTTPStatusError as error:
        raise FedqError(f"the fleet's server refuses: {_words(error.response)}") from None
    except httpx.HTTPError as error:
        raise FedqError(unreachable(fleet, error)) from None
    finally:
        client.close()


def unreachable(fleet: Fleet, error: Exception) -> str:
    """Return what to do about a failed connection to the control port."""
    if "certificate" in str(error).lower():
        return f"the server's certificate is not valid ({error}); run fedq fleet rotate server"
    return "the fleet's server does not answer; start it with fedq fleet up"


def nodes(client: ControlHttpClient) -> list[NodeInfo]:
    """Return all registered devices, in the order of registration."""
    found = client.ListNodes(flower.ListNodesRequest()).nodes_info
    infos = [
        NodeInfo(node.node_id, node.public_key, node.status, node.registered_at)
        for node in found
        if node.status != "unregistered"
    ]
    return sorted(infos, key=lambda node: (node.registered_at, node.node_id))


def sync(client: ControlHttpClient, fleet: Fleet) -> None:
    """Register the fleet's devices in their order, and remove all others."""
    wanted, there = fleet.nodes(), nodes(client)
    for node in there:
        if node.public_key not in wanted.values():
            client.UnregisterNode(flower.UnregisterNodeRequest(node_id=node.node_id))
    known = {node.public_key for node in there}
    for name, key in wanted.items():
        if key not in known:
            client.RegisterNode(flower.RegisterNodeRequest(public_key=key, name=name))


def online(client: ControlHttpClient, fleet: Fleet) -> list[str]:
    """Return the names of the devices that Flower holds for online."""
    states = {node.public_key: node.status for node in nodes(client)}
    return [name for name, key in fleet.nodes().items() if states.get(key) == ONLINE]


def seen(fleet: Fleet) -> dict[str, Any]:
    """Return what the gateway has seen of each device."""
    return _get(fleet, SEEN)


def announce(fleet: Fleet) -> None:
    """Have devices that wait for work look at which release they should run."""
    _get(fleet, RELEASED)


def _get(fleet: Fleet, path: str) -> dict[str, Any]:
    context = ssl.create_default_context(cafile=str(fleet.path("ca.crt")))
    try:
        with urllib.request.urlopen(
            f"https://{fleet.control_address}{path}", timeout=TIMEOUT_S, context=context
        ) as response:
            data = json.load(response)
    except (OSError, ValueError) as error:
        raise FedqError(unreachable(fleet, error)) from None
    assert isinstance(data, dict)
    return data


def _words(response: httpx.Response) -> str:
    error = flower.FlowerError.from_json(response.text)
    return error.message if error is not None else f"HTTP status {response.status_code}"
