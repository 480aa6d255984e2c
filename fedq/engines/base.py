"""What an engine is: something that runs a server over simulated clients."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from fedq import records  # noqa: F401  (sets what Flower reads at import)

# isort: split
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

T = TypeVar("T")


class Engine(abc.ABC):
    """Runs a server function over a grid of simulated clients; frozen, registered."""

    group: ClassVar[str] = "engine"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abc.abstractmethod
    def run(self, server: Callable[[Grid], T], client: Callable[[], ClientApp], clients: int) -> T:
        """Start ``clients`` nodes that run ``client()``, and return what ``server`` returns.

        Node i has ``node_config`` ``{"partition-id": i, "num-partitions": clients}``.
        """
