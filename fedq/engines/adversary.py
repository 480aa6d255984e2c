"""An adversary between any simulated grid and the server: it rewrites the replies of its clients.

It sees every reply of a round before it decides what its own clients send, as the strongest
published attacks assume, and what they send are real messages of real bytes. Honest replies pass
through as they come; hostile ones come last.

A server that steps asynchronously has no rounds. There the adversary waits for the buffer: it sees
all replies that the step takes, whatever their age, and rewrites its own among them. They arrive
when the honest ones would have: time and energy are those of the honest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedq import records, wire
from fedq.attacks._defence import Defence
from fedq.attacks.base import Attack, Honest, View
from fedq.codecs.base import Codec, decode_frame
from fedq.cohort import Nodes
from fedq.engines.stream import WrappedGrid
from fedq.errors import DecodeError
from fedq.experiment import Experiment
from fedq.layout import Layout
from fedq.random import derive, generator

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import Message
from flwr.serverapp import Grid

if TYPE_CHECKING:
    from fedq.asynchronous import Arrival


class Adversary(WrappedGrid):
    """Wraps a grid, some of whose nodes are hostile.

    The replies of earlier rounds that ``replay`` repeats are held in memory: a resumed run has none
    of before the kill.

    Args:
      grid: Where clients are.
      attack: What hostile ones send.
      layout: Names and shapes of deltas.
      codec: How clients encode them.
      seed: Of the run.
      defence: What the server does with their replies; attackers may know it.
      asynchronous: Whether a round is a step, with a buffer in place of a cohort.

    Attributes:
      asked: Hostile clients in the last cohort, or hostile replies in the last buffer.
    """

    def __init__(
        self,
        grid: Grid,
        attack: Attack,
        layout: Layout,
        codec: Codec,
        seed: int,
        defence: Defence | None = None,
        *,
        asynchronous: bool = False,
    ) -> None:
        super().__init__(grid)
        self._attack, self._defence, self._asynchronous = attack, defence, asynchronous
        self._layout, self._codec, self._seed = layout, codec, seed
        self._earlier: dict[int, bytes] = {}
        self._hostile: frozenset[int] | None = None
        self.asked = 0

    @classmethod
    def around(cls, grid: Grid, experiment: Experiment, layout: Layout) -> Grid:
        """Return the grid with an experiment's attack; the grid itself if there is none."""
        if experiment.attack.fraction == 0:
            return grid
        attack, defence = experiment.attack, Defence(experiment.aggregator, experiment.guard)
        return cls(
            grid,
            attack,
            layout,
            experiment.codec,
            experiment.seed,
            defence,
            asynchronous=experiment.pacing.asynchronous,
        )

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages, yield the honest replies, then those of the hostile clients."""
        if self._asynchronous:  # which of them go together is known when a step is over
            yield from self._grid.send_and_receive(messages, timeout=timeout)
            return
        asked = list(messages)
        hostile = self._nodes() & {message.metadata.dst_node_id for message in asked}
        self.asked = len(hostile)
        own: dict[int, tuple[Message, Honest]] = {}
        others: dict[int, Honest] = {}
        for reply in self._grid.send_and_receive(asked, timeout=timeout):
            node = reply.metadata.src_node_id
            opened = self._opened(reply) if hostile else None
            if opened is None or node not in hostile:
                if opened is not None:
                    others[node] = opened
                yield reply
            else:
                own[node] = reply, opened
        if own:
            self._forge(
                int(asked[0].metadata.group_id),
                [own[node] for node in sorted(own)],
                [others[node] for node in sorted(others)],
            )
            yield from (own[node][0] for node in sorted(own))

    def buffered(self, arrivals: Iterator[Arrival], step: int) -> Iterator[Arrival]:
        """Wait for the buffer of a step, and yield it with the hostile replies rewritten."""
        buffer, hostile = list(arrivals), self._nodes()
        self.asked = sum(arrival.node in hostile and not arrival.lost for arrival in buffer)
        own: list[tuple[Message, Honest]] = []
        others: list[Honest] = []
        if self.asked:
            # A client may be in it twice, with an update of an earlier step.
            for arrival in sorted(buffer, key=lambda arrival: (arrival.node, arrival.asked.round)):
                opened = self._opened(arrival.reply)
                if opened is not None and arrival.node in hostile:
                    own.append((arrival.reply, opened))
                elif opened is not None:
                    others.append(opened)
        if own:
            self._forge(step, own, others)
        yield from buffer

    def _forge(
        self, server_round: int, own: Sequence[tuple[Message, Honest]], others: Sequence[Honest]
    ) -> None:
        """Put what hostile clients send in the place of what they would have sent."""
        view = View(
            server_round,
            self._layout,
            self._codec,
            [honest for _, honest in own],
            others,
            dict(self._earlier),
            generator(derive(self._seed, server_round, "attack")),
            self._defence,
        )
        for (reply, honest), blob in zip(own, self._attack.forge(view), strict=True):
            self._earlier[honest.client] = wire.seal(honest.message)
            reply.content = records.pack(blob)

    def _nodes(self) -> frozenset[int]:
        """Return the hostile nodes: places in the order of registration, as the strategy has it."""
        if self._hostile is None:
            nodes = Nodes.of(self._grid)
            places = self._attack.hostile(len(nodes), self._seed)
            self._hostile = frozenset(nodes.order[place] for place in places)
        return self._hostile

    def _opened(self, reply: Message) -> Honest | None:
        """Return a reply with an update, None for any other."""
        if reply.has_error():
            return None
        try:
            message = wire.unseal(records.unpack(reply.content))
            frame = wire.open_frame(message.parts[0], self._layout)
            delta = decode_frame(frame, self._layout)
            return Honest(message, int(message.metadata["client"]), delta, frame.seed)
        except (DecodeError, LookupError):
            return None
