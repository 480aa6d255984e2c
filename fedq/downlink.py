"""The global model on its way down: whole, or as the changes to one that a client still holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedq.codecs.base import Codec
from fedq.layout import Layout, Vector

#: As a base: the model before the first round, which client and server build from the run's seed.
INITIAL = 0


@dataclass(frozen=True)
class Broadcasts:
    """What the server sent lately and who said to keep it; part of a run's state.

    Attributes:
      sent: Encoded global models by round, each decodable on its own.
      held: By node, the round of the newest model that it keeps.
      strangers: Nodes that could not build the initial model.
    """

    sent: Mapping[int, bytes] = field(default_factory=dict)
    held: Mapping[int, int] = field(default_factory=dict)
    strangers: frozenset[int] = frozenset()

    def base(self, node: int) -> int | None:
        """Return the round whose model a node holds and the server remembers."""
        held = self.held.get(node)
        return held if held in self.sent else None

    def after(
        self,
        server_round: int,
        whole: bytes,
        held: Mapping[int, int],
        strangers: frozenset[int],
        history: int,
        under_way: Collection[int] = (),
    ) -> Broadcasts:
        """Return the broadcasts after a round: the last, and recent ones that some node holds.

        ``under_way`` are rounds whose models clients have got that have not answered yet.
        """
        oldest, needed = server_round - history, {*held.values(), *under_way}
        sent = {**self.sent, server_round: whole}
        recent = {r: sent[r] for r in sent if (r > oldest and r in needed) or r == server_round}
        still = {node: r for node, r in held.items() if r in recent}
        return Broadcasts(recent, still, strangers)


def models_kept(history: int) -> int:
    """Return how many received models a directory shared by all clients must hold.

    The oldest base that a round may use, the round's own model, and all between.

    >>> models_kept(16)
    18
    """
    return history + 2


class Downlink:
    """Encodes global models with one codec; predictive codecs also encode changes.

    All clients decode the same model, whatever they held: a base only shortens the payload.

    Args:
      codec: How the model is encoded.
      layout: Names and shapes of the weights.
      history: Rounds for which a base may be used; 0, or a codec that cannot predict, is none.
      initial: (d,) float32 model that clients can build themselves, so that their first one may be
        a change, too.
    """

    def __init__(
        self, codec: Codec, layout: Layout, history: int, initial: Vector | None = None
    ) -> None:
        self.codec, self.layout = codec, layout
        self.history = history if codec.predictive else 0
        self.initial = initial if self.history else None
        self._bases: dict[int, tuple[bytes, Vector]] = {}

    def base(self, node: int, broadcasts: Broadcasts) -> int | None:
        """Return the round whose model a node has, None if it has none."""
        if not self.history:
            return None
        base = broadcasts.base(node)
        if base is None and self.initial is not None and node not in broadcasts.strangers:
            return INITIAL
        return base

    def settled(self, weights: Vector, broadcasts: Broadcasts) -> Vector:
        """Return what to send of a model after the last one that was sent."""
        if not broadcasts.sent:
            return weights
        last = self.sent(broadcasts, max(broadcasts.sent))
        return self.codec.settle(weights, last, self.layout)

    def whole(self, weights: Vector, seed: int) -> bytes:
        """Encode a model on its own."""
        return self.codec.encode(weights, self.layout, seed)

    def changes(self, weights: Vector, seed: int, broadcasts: Broadcasts, base: int) -> bytes:
        """Encode a model for a client that holds the one of round ``base``."""
        reference = self.sent(broadcasts, base)
        return self.codec.encode(weights, self.layout, seed, reference=reference)

    def sent(self, broadcasts: Broadcasts, base: int) -> Vector:
        """Return the model of round ``base`` as clients decoded it, (d,) float32."""
        if base == INITIAL:
            assert self.initial is not None
            return self.initial
        sent = broadcasts.sent[base]
        known = self._bases.get(base)
        if known is None or known[0] is not sent:
            # Decoded once for as long as it is remembered.
            self._bases = {r: kept for r, kept in self._bases.items() if r in broadcasts.sent}
            known = sent, self.codec.decode(sent, self.layout)
            self._bases[base] = known
        return known[1]
