"""Devices: one file per family, found by the registry; every figure says where it is from."""

from fedq.physics.devices.base import Device

__all__ = ["Device"]
