"""Links: one file each, found by the registry; every figure says where it is from."""

from fedq.physics.links.base import Link, Transfer

__all__ = ["Link", "Transfer"]
