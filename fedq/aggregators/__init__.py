"""Aggregation rules: one file per rule; see :class:`fedq.aggregators.base.Aggregator`."""

from fedq.aggregators.base import Aggregator, Stream

__all__ = ["Aggregator", "Stream"]
