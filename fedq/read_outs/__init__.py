"""How the served model is read from the trained one: one file each, found by the registry."""

from fedq.read_outs.base import ReadOut

__all__ = ["ReadOut"]
