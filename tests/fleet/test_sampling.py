"""Who is asked: devices that report enough memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fedq.capacity import Capacity
from fedq.errors import FedqError
from fedq.fleet import control
from fedq.fleet.bundle import enrol
from fedq.fleet.files import Fleet
from fedq.fleet.sampling import FittingGrid
from tests.grids import InlineGrid

# isort: split
from flwr.proto.node_pb2 import NodeInfo


class Nodes(InlineGrid):
    """Flower's side: nodes that are known by their keys."""

    keys: tuple[bytes, ...] = ()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=n + 2, public_key=key) for n, key in enumerate(self.keys)]


def test_devices_are_asked_by_what_they_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet.create(tmp_path / "fleet", name="shelf", server="127.0.0.1")
    for name in ("large", "small", "silent"):
        fleet, _ = enrol(fleet, name)
    reports: dict[str, Any] = {
        "large": {"report": {"ram_mb": 4000}},
        "small": {"report": {"ram_mb": 512}},
    }
    asked: list[Fleet] = []
    down = False

    def seen(fleet: Fleet) -> dict[str, Any]:
        asked.append(fleet)
        if down:
            raise FedqError("the fleet's server does not answer")
        return reports

    monkeypatch.setattr(control, "seen", seen)
    grid = Nodes(lambda message, partition: message, 3)
    grid.keys = tuple(fleet.nodes().values())
    assert list(FittingGrid(grid, fleet, 0).get_node_ids()) == [2, 3, 4]
    assert asked == []
    fitting = FittingGrid(grid, fleet, 1000)
    assert list(fitting.get_node_ids()) == [2]
    reports["silent"] = {"report": {"ram_mb": 1000}}
    assert list(fitting.get_node_ids()) == [2, 4]
    count = len(asked)
    assert [node.node_id for node in fitting.get_nodes()] == [2, 4]
    assert len(asked) == count  # all have told: the gateway is not asked again

    reports["large"]["report"] |= {"up_bytes_s": 1e6, "images_s": 250.0}
    reports["small"]["report"] |= {"up_bytes_s": "fast", "images_s": -1}  # whoever says so
    reports["silent"]["report"] |= {"up_bytes_s": 5e5}
    wanted = [Capacity(8.0, 250.0), Capacity(), Capacity(4.0)]
    assert [fitting.capacities()[node] for node in (2, 3, 4)] == wanted
    down = True  # while the server is started again, and has not been told anything yet
    assert [fitting.capacities()[node] for node in (2, 3, 4)] == wanted
    down, reports = False, {}
    assert [fitting.capacities()[node] for node in (2, 3, 4)] == wanted
