"""Fleets: who has which device and which link; found by the registry."""

from fedq.physics.fleets.base import Fleet, Member

__all__ = ["Fleet", "Member"]
