"""One server for all clients."""

from __future__ import annotations

from typing import ClassVar

from fedq.registry import register
from fedq.topologies.base import Topology


@register("topology", "star")
class Star(Topology):
    """Every client replies to the server itself."""

    flat: ClassVar[bool] = True
