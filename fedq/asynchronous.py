"""Steps without rounds over a simulated fleet: the events of FedBuff (Nguyen et al. 2022).

Goals: the same run for any number of workers, and after any kill; clients train side by side,
though who is asked next depends on who is back first.

What a client answers depends on the model that it got, and not on when it is heard. So requests are
run in batches, whenever the next arrival is not certain otherwise: no reply is earlier than its
client has trained, and that time is known before it is run. What is still under way at the end of a
step has been run, too, and waits in the run's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedq import records, registry
from fedq.codecs.base import Codec
from fedq.cohort import choose
from fedq.engines.timed import Flight, TimedGrid, certain, nth_arrival
from fedq.random import derive, generator

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import Error, Message, MessageType, RecordDict

if TYPE_CHECKING:
    from fedq.rounds import ServerRound
    from fedq.strategy import FedQ


@dataclass(frozen=True)
class Asked:
    """What a client was asked: in which round, and what to encode with."""

    round: int
    codec: Codec


@dataclass(frozen=True)
class Waiting:
    """A reply that is there, but not yet at the server; part of a run's state.

    Attributes:
      node: Who sent it.
      place: Its place in the federation.
      asked: In which round, and what to encode with.
      end_s: When it arrives, in simulated seconds since the run began.
      code: Of an error in its place, None for a reply.
      content: The reply, or the error's reason.
    """

    node: int
    place: int
    asked: Asked
    end_s: float
    code: int | None
    content: bytes
    awaited: ClassVar[bool] = False

    @classmethod
    def of(cls, flight: Flight, asked: Asked) -> Waiting:
        """Keep a reply."""
        reply = flight.reply
        assert reply is not None
        code = reply.error.code if reply.has_error() else None
        content = (
            records.unpack(reply.content) if code is None else str(reply.error.reason).encode()
        )
        return cls(flight.node, flight.place, asked, flight.end_s, code, content)

    @property
    def arrived(self) -> bool:
        """Whether it is a reply, and no error in its place."""
        return self.code is None

    @property
    def reply(self) -> Message:
        """The reply as it came."""
        number = str(self.asked.round)
        request = Message(RecordDict(), self.node, MessageType.TRAIN, group_id=number)
        if self.code is None:
            return Message(records.pack(self.content), reply_to=request)
        return Message(Error(self.code, self.content.decode()), reply_to=request)

    def order(self) -> tuple[float, int]:
        """Return what flights are sorted by."""
        return self.end_s, self.place

    def to_meta(self) -> dict[str, Any]:
        """Return all but the content as plain data."""
        codec = registry.to_config(self.asked.codec)
        plain = {"node": self.node, "place": self.place, "end_s": self.end_s, "code": self.code}
        return {**plain, "round": self.asked.round, "codec": codec}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], content: bytes) -> Waiting:
        """Read what :meth:`to_meta` wrote."""
        asked = Asked(int(meta["round"]), registry.from_config("codec", meta["codec"]))
        code = meta["code"]
        return cls(meta["node"], meta["place"], asked, float(meta["end_s"]), code, content)


@dataclass(frozen=True)
class Arrival:
    """A reply, or an error in its place, that a step takes.

    Attributes:
      node: Who sent it; a client may be in a buffer twice, with an update of an earlier step.
      asked: What it answers.
      slot: Its place in the buffer; one that is lost leaves its place to the next.
      reply: What came.
    """

    node: int
    asked: Asked
    slot: int
    reply: Message

    @property
    def lost(self) -> bool:
        """Whether it is an error."""
        return bool(self.reply.has_error())


class Steps:
    """The requests under way, and the replies of one step.

    Args:
      strategy: Says how many clients are at work.
      timed: The grid with its clock.
      current: The step; it begins with what was under way.

    Attributes:
      air: What is under way.
    """

    def __init__(self, strategy: FedQ, timed: TimedGrid, current: ServerRound) -> None:
        self._strategy, self._timed, self._current = strategy, timed, current
        self.air: list[Flight | Waiting] = list(current.before.waiting)
        self._nodes = strategy.nodes(timed)
        self._asked: dict[int, Asked] = {}  # in this step
        self._batches = 0
        self._now_s = current.opened_s

    def replies(self) -> Iterator[Message]:
        """Yield replies as they arrive, with errors in the place of lost ones, until it is time."""
        current = self._current
        for arrival in self._timed.buffered(self._arrivals(), current.report.round):
            current.asked[arrival.node] = arrival.asked
            current.waiting[arrival.node] = arrival.slot
            yield arrival.reply

    def _arrivals(self) -> Iterator[Arrival]:
        """Yield what arrives, and ask others meanwhile."""
        lacking = wanted = self._current.expected
        self._refill()
        while lacking and (self.air or self._wait()):
            self._settle(lacking)
            self._now_s = max(self._now_s, min(flight.end_s for flight in self.air))
            for flight in sorted(self.air, key=_order):
                if flight.end_s > self._now_s or not lacking:
                    break
                self.air.remove(flight)
                assert flight.reply is not None
                slot = wanted - lacking
                lacking -= flight.arrived
                yield Arrival(flight.node, self._question(flight), slot, flight.reply)
            if lacking:
                self._refill()
        self._run()
        self._timed.closed_s = self._now_s

    def left(self) -> tuple[Waiting, ...]:
        """Return what is under way after the step."""
        return tuple(
            flight if isinstance(flight, Waiting) else Waiting.of(flight, self._question(flight))
            for flight in self.air
        )

    def _question(self, flight: Flight | Waiting) -> Asked:
        """Return what a client answers: a flight is of this step."""
        return flight.asked if isinstance(flight, Waiting) else self._asked[flight.node]

    def _refill(self) -> None:
        """Ask clients until enough of them are at work."""
        current, strategy, clock = self._current, self._strategy, self._timed.clock
        at_work = strategy.cohort(len(self._nodes) - len(current.watch.barred))
        lacking = at_work - len(self.air)
        if lacking <= 0:
            return
        purpose = ("sample", self._batches) if self._batches else ("sample",)
        rng = generator(derive(strategy.seed, current.report.round, *purpose))
        now_s = self._now_s
        there = None if clock.always else lambda place: clock.available(place, now_s)
        batch = choose(self._nodes, lacking, rng, self._busy(), there)
        if not batch:
            return
        self._batches += 1
        requests = current.requests.to(batch)
        self._asked |= {node: current.asked[node] for node in batch}
        for message in requests:
            flight = self._timed.depart(message, self._now_s)
            self.air.append(flight)
            if not flight.awaited:
                self._timed.spend(flight)

    def _busy(self) -> set[int]:
        """Return all nodes that may not be asked, wherever they are."""
        return {flight.node for flight in self.air} | set(self._asked) | self._current.watch.barred

    def _wait(self) -> bool:
        """Let time pass until somebody can be asked; False if everybody has been."""
        busy, clock = self._busy(), self._timed.clock
        if all(node in busy for node in self._nodes):
            return False
        self._now_s = clock.opens(
            self._now_s,
            lambda now_s: any(
                clock.available(place, now_s)
                for place, node in enumerate(self._nodes)
                if node not in busy
            ),
        )
        self._refill()
        return True

    def _settle(self, lacking: int) -> None:
        """Run requests until the next arrivals are certain."""
        while certain(self.air, lacking, nth_arrival(self.air, lacking)):
            self._run()

    def _run(self) -> None:
        """Run whatever is under way: it changes no time, and workers are idle otherwise."""
        fresh = [flight for flight in self.air if isinstance(flight, Flight) and flight.awaited]
        for _ in self._timed.landed(fresh, self._strategy.deadline_s):
            pass
        for flight in fresh:
            if flight.awaited:
                flight.lose(records.LATE, "no reply before round_deadline_s")
            self._timed.spend(flight)


def _order(flight: Flight | Waiting) -> tuple[float, int]:
    return flight.order()
