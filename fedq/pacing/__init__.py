"""When a round closes and who is asked meanwhile: one file each, found by the registry."""

from fedq.pacing.base import Pacing

__all__ = ["Pacing"]
