"""What the strategy knows of a round: the state before and after it, its course, its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedq import wire
from fedq.asynchronous import Asked, Steps, Waiting
from fedq.budgets.base import History
from fedq.capacity import Capacities
from fedq.distillation import Member
from fedq.downlink import Broadcasts, Downlink
from fedq.engines.timed import TimedGrid
from fedq.envelope import Opener
from fedq.errors import DecodeError
from fedq.guard import GuardState, RejectedError, Watch
from fedq.layout import Vector
from fedq.privacy.base import Contribution, Privacy, PrivacyState, Round
from fedq.pruning.base import Support
from fedq.random import SEED_BITS
from fedq.topologies.base import Hop

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.app import Message

if TYPE_CHECKING:
    from fedq.requests import Requests

#: Kept of why updates were lost.
MAX_REASONS = 3


@dataclass(frozen=True)
class ServerState:
    """All that the next round depends on, and all that a checkpoint holds.

    Attributes:
      round: Rounds done.
      weights: (d,) float32, the float master of the global model.
      state: (s,) float32, what is averaged but not trained: quantizer ranges, batch statistics;
        those of several variants behind each other.
      optimizer: The server optimiser's named arrays.
      failures: Rounds in a row without a quorum.
      broadcasts: What was sent lately, and who holds it.
      clients: By node, the client number that it first claimed.
      guard: What the guard remembers.
      privacy: The clipping bound and what clients have spent, None without a mechanism.
      now_s: Simulated seconds since the run began.
      waiting: Replies to earlier steps that have not arrived yet.
      history: What a bit budget follows.
    """

    round: int
    weights: Vector
    state: Vector
    optimizer: Mapping[str, NDArray[np.float32]]
    failures: int = 0
    broadcasts: Broadcasts = field(default_factory=Broadcasts)
    clients: Mapping[int, int] = field(default_factory=dict)
    guard: GuardState = field(default_factory=GuardState)
    privacy: PrivacyState | None = None
    now_s: float = 0.0
    waiting: tuple[Waiting, ...] = ()
    history: History = field(default_factory=History)


@dataclass
class RoundReport:
    """What one round did. All sizes are lengths of bytes that crossed the grid.

    Of a fleet with a clock, ``simulated_seconds`` are from the end of the round before, and
    ``joules`` what all its devices used, by what for; ``wire_*_bytes`` are those on the air. With
    edge aggregators, ``uplink_bytes`` and ``downlink_bytes`` are between clients and edges, and
    those of ``edge`` between them and the server; ``edge_nmse`` is what the second hop's encoding
    added to the mean. ``codecs`` and ``widths`` count the clients that were asked for each, where
    those differ by client.
    """

    round: int
    sampled: int = 0
    received: int = 0
    replies: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    float32_uplink_bytes: int = 0
    float32_downlink_bytes: int = 0
    quarantined: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    train_loss: float | None = None
    seconds: float = 0.0
    skipped: bool = False
    privacy: dict[str, Any] | None = None
    simulated_seconds: float | None = None
    joules: float | None = None
    joules_by_use: dict[str, float] | None = None
    wire_uplink_bytes: int | None = None
    wire_downlink_bytes: int | None = None
    edge_uplink_bytes: int | None = None
    edge_downlink_bytes: int | None = None
    edge_nmse: float | None = None
    codecs: dict[str, int] | None = None
    widths: dict[str, int] | None = None
    sparsity: float | None = None

    def count(self, what: Literal["codecs", "widths"], choice: str) -> None:
        """Count a client that was asked for a codec, or for a width, of its own."""
        counts = getattr(self, what) or {}
        setattr(self, what, {**counts, choice: counts.get(choice, 0) + 1})

    def reject(self, kind: str, reason: str) -> None:
        """Count a lost update, and keep the first few reasons, fit for a terminal."""
        self.rejected[kind] += 1
        if len(self.reasons) < MAX_REASONS:
            printable = "".join(c if c.isprintable() else " " for c in f"{kind}: {reason}")
            self.reasons.append(" ".join(printable.split())[:200])


@dataclass(frozen=True)
class Update:
    """One client's contribution, checked as far as it goes without decoding it."""

    node: int
    slot: int  #: the client's place in the cohort
    delta: wire.Frame | memoryview | bytes  #: a codec's, or the packed integers of a mechanism
    state: bytes | memoryview
    weight: float
    loss: float | None
    source: Contribution
    beside: Vector | None = None  #: how the model moved since the client's base, if that helped
    variant: int = 0  #: which of the states it is
    discount: float = 1.0  #: times the delta, for its age


class Claims:
    """Which client each node is: it keeps the number it first claims, and shares it with none.

    Attributes:
      clients: Numbers by node.
    """

    def __init__(self, clients: dict[int, int]) -> None:
        self.clients = clients
        self._nodes = {client: node for node, client in clients.items()}

    def claim(self, node: int, client: object) -> int:
        """Return the number that a node claims, if it may."""
        if isinstance(client, bool) or not isinstance(client, int) or client >> SEED_BITS:
            raise DecodeError(f"claims to be client {client!r}")
        if self.clients.setdefault(node, client) != client:
            raise RejectedError("seed", f"client {self.clients[node]} claims to be client {client}")
        if self._nodes.setdefault(client, node) != node:
            del self.clients[node]
            raise RejectedError("seed", f"client {client} is another node; number clients apart")
        return client


@dataclass
class Context:
    """What the updates of a round may be coded beside: how the model moved since each base.

    Attributes:
      offered: By node, the base that it was asked to use.
    """

    downlink: Downlink
    broadcasts: Broadcasts
    whole: bytes
    offered: dict[int, int] = field(default_factory=dict)
    _moved: dict[int, Vector] = field(default_factory=dict)  # by base: few, whatever the clients

    @cached_property
    def model(self) -> Vector:
        """The model as this round's clients decode it."""
        return self.downlink.codec.decode(self.whole, self.downlink.layout)

    def claim(self, node: int, base: object) -> Vector | None:
        """Return what a node says that it used, if it may."""
        if base is None:
            return None
        if isinstance(base, bool) or not isinstance(base, int) or self.offered.get(node) != base:
            raise DecodeError(f"coded beside round {base!r}, which it was not asked to use")
        if base not in self._moved:
            self._moved[base] = self.model - self.downlink.sent(self.broadcasts, base)
        return self._moved[base]


@dataclass
class ServerRound:
    """A round under way."""

    before: ServerState
    report: RoundReport
    waiting: dict[int, int]  #: nodes yet to answer, and their places in the cohort
    held: dict[int, int]
    strangers: set[int]
    claims: Claims
    whole: bytes
    context: Context
    watch: Watch
    privacy: Privacy  #: with the bound of this round
    about: Round
    request: Mapping[str, Any]  #: what every client is told beside the model
    openers: Mapping[int, Opener] | None  #: by node, of sealed replies
    weights: Vector  #: what is sent of the model, before it is encoded
    opened_s: float  #: simulated seconds since the run began
    expected: int  #: updates, of which a quorum must be usable
    places: Mapping[int, int]  #: by node, in the order of registration
    capacities: Capacities  #: by place if there is a clock, else by node
    start: float
    support: Support | None = None  #: what of the model is trained
    messages: list[Message] = field(default_factory=list)
    requests: Requests = field(init=False)
    asked: dict[int, Asked] = field(default_factory=dict)  #: by node, last
    examples: dict[int, int] = field(default_factory=dict)  #: by node, of accepted updates
    #: By place, variant, delta and state of accepted updates, if they are still needed.
    members: dict[int, tuple[int, Vector, Vector]] = field(default_factory=dict)
    timing: TimedGrid | None = None
    steps: Steps | None = None
    hop: Hop | None = None  #: where updates go that do not reach the server as they are

    def ensemble(self) -> list[Member]:
        """Return the clients' models, in the order of the cohort."""
        sent = (
            self.context.model if self.support is None else self.support.masked(self.context.model)
        )
        return [
            Member(variant, sent + delta, state)
            for _, (variant, delta, state) in sorted(self.members.items())
        ]

    def answer(self, reply: Message) -> tuple[int, int | None]:
        """Take a node off the waiting list; its place is None if it was not on it."""
        node = reply.metadata.src_node_id
        if reply.has_error() and node not in self.waiting:
            # Flower answers for an unreachable node in its own name: the message tells which.
            replied = reply.metadata.reply_to_message_id
            asked = (m.metadata for m in self.messages if m.metadata.message_id == replied)
            node = next((metadata.dst_node_id for metadata in asked), node)
        return node, self.waiting.pop(node, None)
