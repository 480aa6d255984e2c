"""Secure aggregation over a Flower grid: a round is several exchanges of messages.

Any grid will do: each phase is an ordinary training message, and its answers are checked as those
of other rounds are. The protocol itself is in :mod:`fedq.secagg`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedq import records, wire
from fedq.errors import DecodeError
from fedq.guard import RejectedError
from fedq.keys import Credentials
from fedq.layout import Vector
from fedq.privacy._distributed import Distributed, encoder_of
from fedq.privacy.base import Contribution
from fedq.random import derive
from fedq.replies import MAX_ABSOLUTE, Replies
from fedq.rounds import ServerRound, ServerState
from fedq.sealing import of_phase
from fedq.secagg import AbortedError, Announcement, Codes, binding, run_name
from fedq.secagg._grid import Aggregate, Integers
from fedq.secagg._grid import Grid as IntegerGrid
from fedq.secagg.base import Collector, OnGrid
from fedq.strategy import FedQ

# isort: split
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

#: To what the weights of groups are scaled: what they are rounded to is far below one example.
_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class SecureServer:
    """The server of a mode of secure aggregation.

    Args:
      mode: How.
      credentials: Its keys sign what each round is; its roster says which clients count.
    """

    mode: OnGrid
    credentials: Credentials

    @property
    def masked(self) -> bool:
        """Whether the server sees sums only."""
        return self.mode.masked

    def collect(self, strategy: FedQ, grid: Grid, current: ServerRound) -> ServerState:
        """Run the phases of all groups side by side, and step with the groups' means."""
        return _Collection(self, strategy, grid, current).run()


@dataclass
class _Collection:
    """One round under way."""

    server: SecureServer
    strategy: FedQ
    grid: Grid
    current: ServerRound
    #: Groups that may still give a sum, by their number.
    groups: dict[int, Collector] = field(default_factory=dict)
    #: Whose integers are in the sums.
    accepted: list[Contribution] = field(default_factory=list)

    def __post_init__(self) -> None:
        privacy, about = self.current.privacy, self.current.about
        self.coding: Codes | IntegerGrid
        if isinstance(privacy, Distributed):
            self.coding = Codes(encoder_of(privacy, about))
        else:
            uniform = self.strategy.weighting == "uniform"
            self.coding = self.server.mode.grid(1 if uniform else self.strategy.max_examples)

    def run(self) -> ServerState:
        current, strategy = self.current, self.strategy
        report, before = current.report, current.before
        requests = {m.metadata.dst_node_id: records.unpack(m.content) for m in current.messages}
        slots = dict(current.waiting)
        report.downlink_bytes = 0
        self._announce(list(requests))
        for phase in self.server.mode.phases:
            if phase == "agree":
                self._check_quorum()
            asked = self._asked(phase)
            if not asked:
                break
            received = report.received
            # Where clients train, the request to train comes with the phase's message.
            models = requests if phase in ("mask", "clear") else {}
            self._exchange(phase, asked, models, slots)
            if not models:
                report.received = received  # counts updates, of which this phase has none
        sums = self._sums()
        deltas, states = strategy.streams(current, max(len(sums), 1))
        total = sum(one.weight for one in sums)
        for slot, one in enumerate(sums):
            # A mechanism counts the codes that it gets, and divides by them itself.
            scale = 1.0 if isinstance(self.coding, Codes) else _WEIGHTS / total
            deltas.add(one.delta, one.weight * scale, slot)
            # Under the mask every entry is a plain mean, whatever its merge rule.
            state = strategy.merger.summand(before.state + one.state)
            states[0].add(state, one.weight * scale, slot)
        losses = [(one.loss, float(one.weight)) for one in sums if one.loss is not None]
        return strategy.conclude(current, deltas, states, losses, self.accepted)

    def _announce(self, nodes: list[int]) -> None:
        server, strategy, current = self.server, self.strategy, self.current
        before, number = current.before, current.report.round
        request = current.request
        base = binding(request, current.context.model, before.state)
        d, s = strategy.layout.size, strategy.state_layout.size
        groups = server.mode.groups(len(nodes), derive(strategy.seed, number, "groups"))
        for group, places in enumerate(groups):
            parts = self.coding.segments(len(places), d, s)
            announcement = Announcement(
                run=run_name(request),
                round=number,
                session=secrets.token_hex(16),
                clients=len(places),
                parts=tuple((part.size, part.bits) for part in parts),
                coding=self.coding.to_config(),
                base=base,
                **server.mode.numbers(len(places)),
            )
            self.groups[group] = server.mode.collector(
                announcement,
                server.credentials.identity.signing,
                server.credentials.roster,
                [nodes[place] for place in places],
            )

    def _check_quorum(self) -> None:
        """End a round that would not count before its sum is seen: a look has a price, too."""
        report = self.current.report
        left = sum(len(collector.survivors) for collector in self.groups.values())
        needed = self.strategy.needed(report.sampled)
        if left < needed:
            self.groups.clear()
            report.reject(
                "secure aggregation",
                f"{left} of {report.sampled} clients sent masked integers, a round needs {needed}; "
                "they stay masked",
            )

    def _asked(self, phase: str) -> dict[int, tuple[Collector, bytes]]:
        """Return whom to ask what; groups that have too few left end here."""
        asked: dict[int, tuple[Collector, bytes]] = {}
        for number, collector in list(self.groups.items()):
            try:
                messages = collector.messages(phase)
            except AbortedError as error:
                del self.groups[number]
                self.current.report.reject("secure aggregation", str(error))
                continue
            asked |= {int(str(node)): (collector, text) for node, text in messages.items()}
        return asked

    def _exchange(
        self,
        phase: str,
        asked: Mapping[int, tuple[Collector, bytes]],
        models: Mapping[int, bytes],
        slots: Mapping[int, int],
    ) -> None:
        """Send a phase's messages and take the answers as they come."""
        strategy, current, report = self.strategy, self.current, self.current.report
        contents: dict[tuple[bytes, bytes], RecordDict] = {}
        current.messages = []
        for node in sorted(asked, key=lambda node: slots[node]):
            text, model = asked[node][1], models.get(node, b"")
            if (text, model) not in contents:
                metadata: dict[str, Any] = {"phase": phase, "round": report.round}
                if strategy.sealing is not None:
                    metadata["sealed"] = True
                request = wire.Envelope(metadata, [text, model] if model else [text])
                contents[text, model] = records.pack(wire.seal(request, wire.SECURE_MAGIC))
            content = contents[text, model]
            report.downlink_bytes += len(records.unpack(content))
            current.messages.append(
                Message(content, node, MessageType.TRAIN, group_id=str(report.round))
            )
        current.waiting = {node: slots[node] for node in asked}
        if strategy.sealing is not None:
            current.openers = {
                node: strategy.sealing.opener(
                    of_phase(collector.announcement.session_bytes, phase, report.round)
                )
                for node, (collector, _) in asked.items()
            }
        opened = Replies(strategy, current)
        for reply in self.grid.send_and_receive(current.messages, timeout=strategy.deadline_s):
            try:
                node, _, message = opened.read(reply)
                self._accept(phase, node, asked[node][0], message)
                current.watch.note(node)
            except RejectedError as error:
                current.watch.note(reply.metadata.src_node_id, error.kind)
                report.reject(error.kind, str(error))
        if current.waiting:
            report.rejected["no reply"] += len(current.waiting)

    def _accept(self, phase: str, node: int, collector: Collector, message: wire.Envelope) -> None:
        metadata = message.metadata
        if "dropped" in metadata:
            raise RejectedError("dropped", str(metadata["dropped"]))
        try:
            if len(message.parts) != 1:
                raise DecodeError(f"{len(message.parts)} parts instead of 1")
            claims = self.current.claims
            if not self.server.masked:  # else the roster says who signed as whom
                claims.claim(node, metadata.get("client"))
            collector.receive(phase, node, message.parts[0])
            if (proven := collector.proven(node)) is not None:
                claims.clients[node] = proven
        except DecodeError as error:
            raise RejectedError("malformed", str(error)) from None

    def _sums(self) -> list[Aggregate]:
        """Return what each group that has a sum comes to, and note whose integers are in it."""
        report, strategy = self.current.report, self.strategy
        numbers = self.current.claims.clients
        sums = []
        for collector in self.groups.values():
            clients = len(collector.survivors)
            if not clients:
                continue
            try:
                one = self._decoded(collector.sums(), clients)
                self._check_state(one.state)
            except (AbortedError, DecodeError) as error:
                report.reject("secure aggregation", str(error))
                culprit = getattr(error, "culprit", None)
                if culprit is not None:  # else it could end every round
                    self.current.watch.note(int(str(culprit)), "malformed")
                continue
            sums.append(one)
            # Weights are under the mask: how many examples each has is not known.
            nodes = (int(str(node)) for node in collector.survivors)
            self.accepted += [Contribution(numbers[node], 1) for node in nodes]
            report.replies += clients
            report.float32_uplink_bytes += clients * strategy.float32_reply_bytes
        return sums

    def _decoded(self, sums: Sequence[Integers], clients: int) -> Aggregate:
        strategy = self.strategy
        if isinstance(self.coding, Codes):
            return self.coding.decode(sums, clients, strategy.state_layout.size)
        rotation = derive(strategy.seed, self.current.report.round, "rotation")
        return self.coding.decode(sums, clients, strategy.layout.size, rotation)

    def _check_state(self, change: Vector) -> None:
        state = self.current.before.state + change
        if state.size and np.abs(state).max() >= MAX_ABSOLUTE:
            raise DecodeError(f"a coordinate of the state exceeds {MAX_ABSOLUTE}")
