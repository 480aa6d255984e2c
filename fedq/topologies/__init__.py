"""The way of updates from clients to the server: one file each, found by the registry."""

from fedq.topologies.base import Topology

__all__ = ["Topology"]
