"""A fleet's clock between any simulated grid and the server: replies get a time, or get lost.

Clients really train, and their replies have the lengths that they have; only when they arrive is
simulated. What a device would not have begun before its round closed is not run at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol, TypeVar

from fedq import records, wire
from fedq.engines.stream import WrappedGrid
from fedq.physics.clock import Clock, Energy, Exchange

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import Error, Message
from flwr.serverapp import Grid


class Flight:
    """One request under way.

    Args:
      message: The request.
      place: The client's place in the federation.
      server_round: In which it was asked.
      phase: Which of several requests of the round it is.
      start_s: When it was sent, in simulated seconds since the run began.
      clock: The fleet's.

    Attributes:
      exchange: What it takes; without the reply until that is there.
      end_s: When the server hears of it; until the reply is there, no later than that.
      reply: The client's, or an error in its place; None until it is there.
    """

    def __init__(
        self,
        message: Message,
        place: int,
        server_round: int,
        phase: int,
        start_s: float,
        clock: Clock,
    ) -> None:
        self.message, self.place, self.start_s = message, place, start_s
        self.reply: Message | None = None
        self._clock = clock
        blob = records.unpack(message.content)
        self._exchange = partial(
            clock.exchange,
            place,
            server_round,
            down_bytes=len(blob),
            trains=_trains(blob),
            phase=phase,
        )
        self.exchange: Exchange = self._exchange()
        self.end_s = start_s + self.exchange.trained_s

    @property
    def node(self) -> int:
        """Who was asked."""
        return self.message.metadata.dst_node_id

    @property
    def awaited(self) -> bool:
        """Whether nothing is known of the reply yet."""
        return self.reply is None

    @property
    def arrived(self) -> bool:
        """Whether there is a reply, and no error in its place."""
        return self.reply is not None and self.reply.has_content()

    def order(self) -> tuple[float, int]:
        """Return what flights are sorted by: time, and at equal times their places."""
        return self.end_s, self.place

    def lose(self, code: int, reason: str) -> None:
        """Put an error in the place of the reply."""
        self.reply = Message(Error(code, reason), reply_to=self.message)

    def land(self, reply: Message) -> None:
        """Take the reply: its length says when it arrives."""
        self.reply = reply
        up_bytes = len(records.unpack(reply.content)) if reply.has_content() else 0
        self.exchange = self._exchange(up_bytes=up_bytes)
        self.end_s = self.start_s + self.exchange.seconds
        if not self._clock.available(self.place, self.end_s):
            self.lose(records.AWAY, "the device went away before its reply was there")


class TimedGrid(WrappedGrid):
    """Wraps a grid for one round of simulated time.

    Args:
      grid: Where clients are.
      clock: The fleet's.
      places: By node, its place in the federation.
      server_round: The round.
      opened_s: When it began, in simulated seconds since the run began.
      deadline_s: After which it closes, in seconds since it began; None waits.
      first: Replies after which it closes; None waits for all.

    Attributes:
      clock: As given.
      closed_s: When the last thing happened, in simulated seconds since the run began.
      wire_uplink_bytes: On the air so far, with headers and repetitions; ``wire_downlink_bytes``
        likewise.
    """

    def __init__(
        self,
        grid: Grid,
        clock: Clock,
        places: Mapping[int, int],
        server_round: int,
        opened_s: float,
        *,
        deadline_s: float | None = None,
        first: int | None = None,
    ) -> None:
        super().__init__(grid)
        self.clock = clock
        self._places, self._round = places, server_round
        self._deadline_s = math.inf if deadline_s is None else opened_s + deadline_s
        self._first = first
        self._phase = 0
        self._spent: list[Energy] = []
        self.wire_uplink_bytes = self.wire_downlink_bytes = 0
        self.closed_s = opened_s

    @property
    def energy(self) -> Energy:
        """What the round took of all its devices; exact sums, so that order does not matter."""
        return Energy(
            math.fsum(spent.training for spent in self._spent),
            math.fsum(spent.radio for spent in self._spent),
            math.fsum(spent.waiting for spent in self._spent),
        )

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages; yield the replies that arrive in time, and errors for the others."""
        flights = [self.depart(message, self.closed_s) for message in messages]
        self._phase += 1
        if self._first is None or self._first >= len(flights):
            yield from self._all(flights, timeout)
        else:
            yield from self._fastest(flights, self._first, timeout)

    def _all(self, flights: list[Flight], timeout: float | None) -> Iterator[Message]:
        """Yield replies as clients finish, whatever their simulated order."""
        end_s = self.closed_s
        for flight in self.landed(flights, timeout):
            if flight.end_s > self._deadline_s:
                flight.lose(records.LATE, "its reply comes after the deadline")
            end_s = max(end_s, min(flight.end_s, self._deadline_s))
            self.spend(flight, self._deadline_s)
            assert flight.reply is not None
            yield flight.reply
        self.closed_s = end_s

    def _fastest(
        self, flights: list[Flight], first: int, timeout: float | None
    ) -> Iterator[Message]:
        """Yield the first replies in simulated order; the round closes with the last of them."""
        while True:
            closes_s = min(nth_arrival(flights, first), self._deadline_s)
            batch = certain(flights, first, closes_s)
            if not batch:
                break
            for _ in self.landed(batch, timeout):
                pass
            for flight in batch:
                if flight.reply is None:
                    flight.lose(records.LATE, "no reply before round_deadline_s")
        for flight in sorted(flights, key=Flight.order):
            if flight.end_s > self._deadline_s:
                flight.lose(records.LATE, "its reply comes after the deadline")
            elif flight.end_s > closes_s or (flight.arrived and not first):
                flight.lose(records.SURPLUS, "others were faster")
            first -= flight.arrived
            self.spend(flight, closes_s)
            assert flight.reply is not None
            yield flight.reply
        self.closed_s = closes_s

    def depart(self, message: Message, start_s: float) -> Flight:
        """Send one request at a time, without running it yet."""
        place = self._places[message.metadata.dst_node_id]
        flight = Flight(message, place, self._round, self._phase, start_s, self.clock)
        if self.clock.dies(place, self._round):
            flight.lose(records.DROPOUT, "the device died while it trained")
        return flight

    def landed(self, flights: Iterable[Flight], timeout: float | None) -> Iterator[Flight]:
        """Run requests, and yield each when its reply is there."""
        waiting: dict[int, Flight] = {}
        for flight in flights:
            if flight.reply is None and flight.end_s > self._deadline_s:
                flight.lose(records.LATE, "it still trains at the deadline")
            if flight.reply is None:
                waiting[flight.node] = flight
            else:
                yield flight
        if waiting:
            asked = [flight.message for flight in waiting.values()]
            for reply in self._grid.send_and_receive(asked, timeout=timeout):
                landing = waiting.pop(_sender(reply, asked), None)
                if landing is not None:  # else it was not asked, or has answered already
                    landing.land(reply)
                    yield landing

    def spend(self, flight: Flight, until_s: float = math.inf) -> None:
        """Add what a device used until it was done, or was stopped."""
        until_s -= flight.start_s
        self._spent.append(flight.exchange.energy(until_s))
        up, down = flight.exchange.wire_bytes(until_s)
        self.wire_uplink_bytes += up
        self.wire_downlink_bytes += down


class Landing(Protocol):
    """A request under way, as far as time is concerned; see :class:`Flight`."""

    @property
    def end_s(self) -> float:
        """When the server hears of it."""

    @property
    def awaited(self) -> bool:
        """Whether nothing is known of the reply yet."""

    @property
    def arrived(self) -> bool:
        """Whether there is a reply."""

    def order(self) -> tuple[float, int]:
        """Return what it is sorted by."""


L = TypeVar("L", bound=Landing)


def nth_arrival(flights: Iterable[Landing], n: int) -> float:
    """Return when the n-th reply is there, or the last thing happens; as yet no later than that."""
    flights = list(flights)
    arrivals = sorted(flight.end_s for flight in flights if flight.awaited or flight.arrived)
    return arrivals[n - 1] if len(arrivals) >= n else max(flight.end_s for flight in flights)


def certain(flights: Iterable[L], n: int, closes_s: float) -> list[L]:
    """Return flights to run now: their clients have trained for certain when the n-th reply comes.

    No reply is earlier than its client has trained. So of those that are not run yet, the ones that
    the count of replies still lacks will have trained by then, and one more if it might be earlier
    than one that is there.
    """
    flights = list(flights)
    waiting = [flight for flight in flights if flight.awaited and flight.end_s <= closes_s]
    lacking = n - sum(flight.arrived for flight in flights)
    return sorted(waiting, key=lambda flight: flight.order())[: max(lacking, 1)]


def _sender(reply: Message, asked: Iterable[Message]) -> int:
    """Return who replied; Flower answers for an unreachable node in its own name."""
    if reply.has_error():
        number = reply.metadata.reply_to_message_id
        for message in asked:
            if number and message.metadata.message_id == number:
                return message.metadata.dst_node_id
    return reply.metadata.src_node_id


def _trains(blob: bytes) -> bool:
    """Whether a request asks its client to train: a phase of secure aggregation may not."""
    return not blob.startswith(wire.SECURE_MAGIC) or (
        len(wire.unseal(blob, wire.SECURE_MAGIC).parts) > 1
    )
