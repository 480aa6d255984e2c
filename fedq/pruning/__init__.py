"""Which weights a round leaves out: one file each, found by the registry."""

from fedq.pruning.base import Group, Pruning, Structure, Support

__all__ = ["Group", "Pruning", "Structure", "Support"]
