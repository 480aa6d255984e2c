"""What a topology is, and what it puts between the clients of a round and their server."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from fedq.aggregators.base import Stream
from fedq.layout import Layout


class Hop(Protocol):
    """One round between the clients and the server: it hears updates, and forwards what it likes.

    Attributes:
      downlink_bytes: From the server to the hop.
      uplink_bytes: Of what was forwarded.
      nmse: ``|mean - exact|**2 / |exact|**2``: what forwarding added to the mean of deltas.
    """

    downlink_bytes: int
    uplink_bytes: int
    nmse: float

    @property
    def delta(self) -> Stream:
        """Where deltas go; its result is the server's."""

    @property
    def states(self) -> Sequence[Stream]:
        """Where states go, by variant."""

    def forward(self) -> None:
        """Send what was heard on to the server; before that it has no results."""


class Topology(abc.ABC):
    """Who hears a client's reply; registered, frozen.

    Attributes:
      flat: Whether that is the server itself.
    """

    group: ClassVar[str] = "topology"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    flat: ClassVar[bool]

    @abc.abstractmethod
    def hop(
        self,
        layout: Layout,
        states: Sequence[int],
        seed: int,
        server_round: int,
        requests: Iterable[tuple[int, bytes]],
        of: int,
    ) -> Hop | None:
        """Return what a round's updates go through; None if the server hears them itself.

        Args:
          layout: Names and shapes of deltas.
          states: Coordinates of a state, one entry per variant.
          seed: Of the run.
          server_round: The round.
          requests: By slot of the cohort, the client's place in the federation and what it is sent;
            the same object if it is the same.
          of: Clients in the federation.
        """
