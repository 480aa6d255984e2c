"""What the clients of a round are asked: the model that each lacks, its codec and its width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedq import records, registry, wire
from fedq.asynchronous import Asked
from fedq.budgets.base import Candidate
from fedq.capacity import Capacity
from fedq.codecs.base import Codec
from fedq.codecs.identity import Identity
from fedq.random import derive
from fedq.rounds import ServerRound

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import Message, MessageType, RecordDict

if TYPE_CHECKING:
    from fedq.strategy import FedQ


class Requests:
    """The requests of one round; a content is made once for all clients that have the same.

    Args:
      strategy: Whose clients they are.
      current: The round; it learns who was asked what, and how many bytes that took.
    """

    def __init__(self, strategy: FedQ, current: ServerRound) -> None:
        self._strategy, self._current = strategy, current
        self._models: dict[int | None, bytes] = {None: current.whole}  # encoded, by base
        self._contents: dict[tuple[int | None, Codec, str | None], RecordDict] = {}
        self._float32_bytes = len(self._blob(strategy.float32, strategy.codec))

    def to(self, nodes: Sequence[int]) -> list[Message]:
        """Return requests to nodes that are asked at the same time."""
        strategy, history = self._strategy, self._current.before.history
        cohort = [self._candidate(node) for node in nodes]
        codecs = strategy.budget.codecs(strategy.codec, history, cohort, strategy.layout.size)
        return [self._ask(node, codec) for node, codec in zip(nodes, codecs, strict=True)]

    def _candidate(self, node: int) -> Candidate:
        examples = self._current.before.history.examples.get(node)
        median = self._current.capacities.median
        return Candidate(examples, self._capacity(node).uplink_mbps, median.uplink_mbps)

    def _capacity(self, node: int) -> Capacity:
        simulated = self._strategy.clock is not None
        return self._current.capacities[self._current.places[node] if simulated else node]

    def _width(self, node: int) -> str | None:
        """Return the width that a node is asked to train in; None leaves that to the node."""
        strategy, median = self._strategy, self._current.capacities.median
        if strategy.width is None:
            return None
        return strategy.variants[strategy.width(self._capacity(node).speed, median.speed)]

    def _ask(self, node: int, codec: Codec) -> Message:
        """Return a node's request: the model whole, or as changes if those are shorter."""
        strategy, current, report = self._strategy, self._current, self._current.report
        base, width = strategy.downlink.base(node, current.before.broadcasts), self._width(node)
        if not strategy.budget.fixed:
            report.count("codecs", registry.describe(codec))
        if width is not None:
            report.count("widths", width)
        content, whole = (self._content(b, codec, width) for b in (base, None))
        if len(records.unpack(content)) > len(records.unpack(whole)):
            content = whole
        elif strategy.uplink_context and base is not None:
            current.context.offered[node] = base
        current.asked[node] = Asked(report.round, codec)
        report.sampled += 1
        report.downlink_bytes += len(records.unpack(content))
        report.float32_downlink_bytes += self._float32_bytes
        return Message(content, node, MessageType.TRAIN, group_id=str(report.round))

    def _content(self, base: int | None, codec: Codec, width: str | None) -> RecordDict:
        strategy, current = self._strategy, self._current
        if base not in self._models:
            assert base is not None
            seed = derive(strategy.seed, current.report.round, "downlink")
            self._models[base] = strategy.downlink.changes(
                current.weights, seed, current.before.broadcasts, base
            )
        key = base, codec, width
        if key not in self._contents:
            self._contents[key] = records.pack(self._blob(self._models[base], codec, base, width))
        return self._contents[key]

    def _blob(
        self, model: bytes, codec: Codec, base: int | None = None, width: str | None = None
    ) -> bytes:
        strategy, current = self._strategy, self._current
        metadata = dict(current.request)
        if codec is not strategy.codec:
            metadata["codec"] = registry.to_config(codec)
        if width is not None:
            metadata["width"] = width
        if strategy.downlink.history:
            metadata["keep"] = True
        if base is not None:
            metadata["base"] = base
            if strategy.uplink_context:
                metadata["context"] = True
        state = Identity().encode(current.before.state, strategy.states_layout)
        return wire.seal(wire.Envelope(metadata, [model, state]))
