"""When devices can be asked: one file each, found by the registry."""

from fedq.physics.availability.base import Availability

__all__ = ["Availability"]
