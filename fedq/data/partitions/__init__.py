"""Ways to share a data set out; see :class:`fedq.data.partitions.base.Partition`."""

from fedq.data.partitions.base import Partition

__all__ = ["Partition"]
