"""Which devices a run asks, and what it knows of them: by what they report of themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fedq.capacity import Capacities
from fedq.engines.stream import StreamGrid
from fedq.errors import FedqError
from fedq.fleet import control
from fedq.fleet.files import Fleet
from fedq.fleet.profile import capacity_of, positive

# isort: split
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

LOG = logging.getLogger("fedq")


class FittingGrid(StreamGrid):
    """A streaming grid of those devices alone that report enough memory.

    Args:
      grid: Of all devices.
      fleet: Whose gateway has seen what they report.
      min_memory_mb: Least memory of a device; 0 takes all, whatever they report.
    """

    def __init__(self, grid: Grid, fleet: Fleet, min_memory_mb: int) -> None:
        super().__init__(grid)
        self._fleet, self._least = fleet, min_memory_mb
        self._memory_mb: dict[bytes, int] = {}
        self._reports: dict[bytes, dict[str, Any]] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that fit."""
        nodes = list(self._grid.get_nodes())
        if not self._least:
            return nodes
        if any(node.public_key not in self._memory_mb for node in nodes):
            self._look()
        return [node for node in nodes if self._memory_mb.get(node.public_key, 0) >= self._least]

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that fit."""
        if not self._least:
            return self._grid.get_node_ids()
        return [node.node_id for node in self.get_nodes()]

    def capacities(self) -> Capacities:
        """Return what the devices have measured, by node."""
        self._look()
        return Capacities(
            {
                node.node_id: capacity_of(self._reports.get(node.public_key, {}))
                for node in self._grid.get_nodes()
            }
        )

    def _look(self) -> None:
        try:
            seen = control.seen(self._fleet)
        except FedqError:  # a server that is started again; what was known goes on
            return
        for name, key in self._fleet.nodes().items():
            report = self._reports.setdefault(key, {})
            report.update(seen.get(name, {}).get("report", {}))
            memory_mb = positive(report.get("ram_mb"))
            if memory_mb is not None and key not in self._memory_mb:
                self._memory_mb[key] = int(memory_mb)
                if memory_mb < self._least:
                    LOG.warning("%s is not asked: it has %d MB of memory", name, memory_mb)
