"""Secure aggregation over a Flower grid: a round is several exchanges of messages.

Any grid will do: each phase is an ordinary training message, and its answers are checked as those
of other rounds are. The protocol itself is in :mod:`fedq.secagg`.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedq import records, wire
from fedq.errors import DecodeError
from fedq.guard import RejectedError
from fedq.keys import Credentials
from fedq.layout import Vector
from fedq.random import derive
from fedq.sealing import of_phase
from fedq.secagg import AbortedError, Announcement, IntegerNoise, binding, run_name
from fedq.secagg._grid import Mean
from fedq.secagg.base import Collector, OnGrid
from fedq.strategy import MAX_ABSOLUTE, FedQ, ServerState, _Round

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
      noise: What clients add to their integers.
    """

    mode: OnGrid
    credentials: Credentials
    noise: IntegerNoise | None = None

    def collect(self, strategy: FedQ, grid: Grid, current: _Round) -> ServerState:
        """Run the phases of all groups side by side, and step with the groups' means."""
        return _Collection(self, strategy, grid, current).run()


@dataclass
class _Collection:
    """One round under way."""

    server: SecureServer
    strategy: FedQ
    grid: Grid
    current: _Round
    #: Groups that may still give a sum, by their number.
    groups: dict[int, Collector] = field(default_factory=dict)

    def __post_init__(self) -> None:
        uniform = self.strategy.weighting == "uniform"
        weight = 1 if uniform else self.strategy.max_examples
        self.coding = self.server.mode.grid(weight, self.server.noise)

    def run(self) -> ServerState:
        current, strategy = self.current, self.strategy
        report, before = current.report, current.before
        requests = {m.metadata.dst_node_id: records.unpack(m.content) for m in current.messages}
        slots = dict(current.waiting)
        report.downlink_bytes = 0
        self._announce(list(requests))
        for phase in self.server.mode.phases:
            asked = self._asked(phase)
            if not asked:
                break
            received = report.received
            # Where clients train, the request to train comes with the phase's message.
            models = requests if phase in ("mask", "clear") else {}
            self._exchange(phase, asked, models, slots)
            if not models:
                report.received = received  # counts updates, of which this phase has none
        means = self._means()
        deltas, states = strategy.streams(current, max(len(means), 1))
        total = sum(mean.weight for mean in means)
        for slot, mean in enumerate(means):
            weight = mean.weight * (_WEIGHTS / total)
            deltas.add(mean.delta, weight, slot)
            # Under the mask every entry is a plain mean, whatever its merge rule.
            states[0].add(strategy.merger.summand(before.state + mean.state), weight, slot)
        losses = [(mean.loss, float(mean.weight)) for mean in means]
        return strategy.conclude(current, deltas, states, losses)

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
                coding=dataclasses.asdict(self.coding),
                base=base,
                **server.mode.numbers(len(places)),
            )
            self.groups[group] = server.mode.collector(
                announcement,
                server.credentials.identity.signing,
                server.credentials.roster,
                [nodes[place] for place in places],
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
        replies = self.grid.send_and_receive(current.messages, timeout=strategy.deadline_s)
        for reply in replies:
            try:
                node, _, message = strategy._read(reply, current)
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
            if not self.server.mode.proves:  # else the roster says who signed as whom
                self.current.claims.claim(node, metadata.get("client"))
            collector.receive(phase, node, message.parts[0])
        except DecodeError as error:
            raise RejectedError("malformed", str(error)) from None

    def _means(self) -> list[Mean]:
        """Return the mean of each group that has one."""
        report, strategy = self.current.report, self.strategy
        means = []
        for collector in self.groups.values():
            clients = len(collector.survivors)
            if not clients:
                continue
            rotation = derive(strategy.seed, report.round, "rotation")
            try:
                mean = self.coding.decode(collector.sums(), clients, strategy.layout.size, rotation)
                self._check_state(mean.state)
            except (AbortedError, DecodeError) as error:
                report.reject("secure aggregation", str(error))
                continue
            means.append(mean)
            report.replies += clients
            report.float32_uplink_bytes += clients * strategy._float32_reply_bytes
        return means

    def _check_state(self, change: Vector) -> None:
        state = self.current.before.state + change
        if state.size and np.abs(state).max() >= MAX_ABSOLUTE:
            raise DecodeError(f"a coordinate of the state exceeds {MAX_ABSOLUTE}")
