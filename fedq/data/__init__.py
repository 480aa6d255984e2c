"""Data sets: one file per source; see :class:`fedq.data.base.Data`."""

from fedq.data.base import Data, Dataset, load

__all__ = ["Data", "Dataset", "load"]
