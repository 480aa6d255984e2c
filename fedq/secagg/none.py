"""A trusted server: it decodes each update."""

from __future__ import annotations

from fedq.registry import register
from fedq.secagg.base import SecureAggregation


@register("secure_aggregation", "none")
class Trusted(SecureAggregation):
    """The server decodes each update; any codec, any rule."""
