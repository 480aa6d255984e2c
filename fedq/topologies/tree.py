"""Sums on the way to the server: edge aggregators, Liu et al. 2020, https://arxiv.org/abs/1905.06641.

Edges run in the server's process, one after the other as replies come; what they forward is sealed,
counted and opened as the bytes that it is. Each holds 16 bytes per coordinate during a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fedq import wire
from fedq.aggregators.base import Stream
from fedq.aggregators.mean import MeanStream
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.random import derive, round_seed
from fedq.registry import register
from fedq.topologies.base import Topology


@register("topology", "tree")
class Tree(Topology):
    """Clients reply to an edge near them; edges sum, and forward one message each.

    Edge e serves a contiguous block of the federation. It gets every distinct request once, hands
    it on, decodes the replies and sums them exactly, with their weights. Then it forwards ::

        codec is null:  the sum itself, integers; the server's mean is that of a star, to the bit
        a codec:        codec(sum_i w_i u_i / sum_i w_i) and sum_i w_i, which the server weighs by

    A codec's error comes on top of the clients' own; a round reports it as ``edge_nmse``, measured
    against the exact mean of the same updates. What is averaged but not trained goes as exact sums.

    Args:
      edges: Edge aggregators, at least 1.
      codec: How they encode means; None forwards exact sums, of some 8 bytes per coordinate.

    Example:
      >>> Tree(edges=10).edge(place=57, of=100)
      5

    Reference:
      Liu et al. 2020, "Client-edge-cloud hierarchical federated learning", Algorithm 1, with one
      edge aggregation per global one.
    """

    flat: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"edges": 3, "codec": {"name": "uniform", "bits": 8, "rounding": "dithered"}},
    )

    edges: int = 10
    codec: Codec | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.edges <= 1 << 20:
            raise ConfigError(f"topology.edges must be 1 to {1 << 20}, not {self.edges}")
        if self.codec is not None and self.codec.outermost:
            raise ConfigError(
                f"topology.codec={self.codec.name} keeps a residual, which an edge with another "
                "cohort in every round has no use for; choose its inner codec"
            )

    def edge(self, place: int, of: int) -> int:
        """Return which edge serves the client at a place of a federation."""
        return place * self.edges // of

    def hop(
        self,
        layout: Layout,
        states: Sequence[int],
        seed: int,
        server_round: int,
        requests: Iterable[tuple[int, bytes]],
        of: int,
    ) -> Edges:
        """Return the round's edges."""
        sent = [(self.edge(place, of), blob) for place, blob in requests]
        served = [edge for edge, _ in sent]
        edges = Edges(self, layout, states, seed, server_round, served)
        edges.downlink_bytes = self.relayed(sent)
        return edges

    def relayed(self, requests: Iterable[tuple[int, bytes]]) -> int:
        """Return the bytes of requests on their way to edges: each distinct one once per edge.

        Args:
          requests: Edges, and what a client of theirs is sent; the same object if it is the same.
        """
        sent = {(edge, id(blob)): len(blob) for edge, blob in requests}
        return sum(sent.values())


class Edges:
    """The edges of one round: streams that sum by edge, and what is forwarded of them.

    Args:
      tree: How many edges, and how they encode.
      layout: Names and shapes of deltas.
      states: Coordinates of a state, one entry per variant.
      seed: Of the run.
      server_round: The round.
      served: By slot of the cohort, the client's edge.

    Attributes:
      delta: Where deltas go.
      states: Where states go, by variant.
      downlink_bytes: Of what was handed on to clients.
      uplink_bytes: Of what was forwarded.
      nmse: ``|mean - exact|**2 / |exact|**2``: what encoding added to the mean of deltas.
    """

    def __init__(
        self,
        tree: Tree,
        layout: Layout,
        states: Sequence[int],
        seed: int,
        server_round: int,
        served: Sequence[int],
    ) -> None:
        self._tree, self._layout, self._round = tree, layout, server_round
        self._seed = round_seed(derive(seed, "edges"), server_round)
        self.delta = ByEdge(layout.size, served)
        self.states = [ByEdge(size, served) for size in states]
        self.downlink_bytes = self.uplink_bytes = 0
        self.nmse = 0.0

    def forward(self) -> None:
        """Let every edge that heard of a client send its message, and the server add it up."""
        exact = MeanStream(self._layout.size)
        for edge in sorted(self.delta.sums):
            blob = self._message(edge)
            self.uplink_bytes += len(blob)
            self._receive(blob)
            exact.merge(self.delta.sums.pop(edge))
        if exact.weight:
            wanted = exact.result().astype(np.float64)
            error = self.delta.root.result() - wanted
            power = float(wanted @ wanted)
            self.nmse = float(error @ error) / power if power else 0.0

    def _message(self, edge: int) -> bytes:
        """Return what an edge forwards."""
        delta, codec = self.delta.sums[edge], self._tree.codec
        metadata = {"round": self._round, "edge": edge, "clients": delta.count}
        if codec is None or not delta.units:
            first = delta.dump()
        else:
            metadata["units"] = delta.units
            seed = codec.client_seed(self._seed, edge)
            first = codec.encode(delta.result(), self._layout, seed)
        states = [stream.sums.pop(edge, None) for stream in self.states]
        others = [b"" if state is None else state.dump() for state in states]
        lengths = b"".join(wire.varint(len(other)) for other in others)
        return wire.seal(wire.Envelope(metadata, [first, lengths + b"".join(others)]))

    def _receive(self, blob: bytes) -> None:
        """Add what an edge forwarded to the server's own sums."""
        message = wire.unseal(blob)
        if len(message.parts) != 2:
            raise DecodeError(f"{len(message.parts)} parts of an edge instead of 2")
        first, units = message.parts[0], message.metadata.get("units")
        if units is None:
            self.delta.root.merge(MeanStream.load(first, self._layout.size))
        else:
            assert self._tree.codec is not None
            mean = self._tree.codec.decode(first, self._layout)
            self.delta.root.add_mean(mean, units, int(message.metadata["clients"]))
        reader = wire.Reader(message.parts[1])
        lengths = [reader.varint() for _ in self.states]
        for stream, length in zip(self.states, lengths, strict=True):
            if length:
                stream.root.merge(MeanStream.load(reader.take(length), stream.size))
        reader.end()


class ByEdge(Stream):
    """Sums of (d,) updates by edge, and the server's own sum of them.

    Args:
      size: d.
      served: By slot, the client's edge.
    """

    def __init__(self, size: int, served: Sequence[int]) -> None:
        self.size, self._served = size, served
        self.sums: dict[int, MeanStream] = {}
        self.root = MeanStream(size)

    def add(self, update: Vector, weight: float, slot: int) -> None:
        """Add an update to the sum of its client's edge."""
        edge = self._served[slot]
        if edge not in self.sums:
            self.sums[edge] = MeanStream(self.size)
        self.sums[edge].add(update, weight)

    def result(self) -> Vector:
        """Return the server's mean."""
        return self.root.result()
