"""Server optimisers: one file per rule; see :class:`fedq.optimizers.base.ServerOptimizer`."""

from fedq.optimizers.base import ServerOptimizer

__all__ = ["ServerOptimizer"]
