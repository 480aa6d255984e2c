"""One server for all clients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from fedq.layout import Layout
from fedq.registry import register
from fedq.topologies.base import Topology


@register("topology", "star")
class Star(Topology):
    """Every client replies to the server itself."""

    flat: ClassVar[bool] = True

    def hop(
        self,
        layout: Layout,
        states: Sequence[int],
        seed: int,
        server_round: int,
        requests: Iterable[tuple[int, bytes]],
        of: int,
    ) -> None:
        """Return None."""
