"""The way of updates from clients to the server: one file each, found by the registry."""

from fedq.topologies.base import Hop, Topology

__all__ = ["Hop", "Topology"]
