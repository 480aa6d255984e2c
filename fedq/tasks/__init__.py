"""What a network learns: one file per task; see :class:`fedq.tasks.base.Task`."""

from fedq.tasks.base import Task

__all__ = ["Task"]
