"""What an attack is: what hostile clients of a simulation send in place of their honest replies.

Attacks happen on the server's side of a simulation, between the engine's grid and the strategy
(:mod:`fedq.engines.adversary`): clients have no such switch. What they send are real messages, so
the codec, the guard and the aggregator see what they would see of a hostile device.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import wire
from fedq.attacks._defence import Defence
from fedq.codecs.base import Codec
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector
from fedq.random import derive, generator

Rows = NDArray[np.float64]
Inputs = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Accomplice:
    """One hostile client, as it prepares its training rows.

    Attributes:
      place: Its place among the hostile, from 0.
      of: How many they are.
      classes: Of the task.
      high: The largest value that inputs take.
      seed: Of its choices, the same in all rounds.
    """

    place: int
    of: int
    classes: int
    high: float
    seed: int


@dataclass(frozen=True)
class Honest:
    """One reply as its client trained it.

    Attributes:
      message: The reply.
      client: The client's number.
      delta: (d,) float32, decoded.
      seed: That the server expects of the client's codec.
    """

    message: wire.Envelope
    client: int
    delta: Vector
    seed: int


@dataclass(frozen=True)
class View:
    """What colluding attackers know in a round: everything.

    Attributes:
      round: The round, or the step of a server without rounds; then the updates are those of the
        buffer, each trained from the model that its client was sent.
      layout: Names and shapes of the delta.
      codec: How updates are encoded.
      own: What the attackers would have sent, by client number.
      others: What the honest clients send, by client number.
      earlier: By client number, the attackers' sealed replies of the last round they took part in.
      rng: Of this round's attack.
      defence: What the server does with replies; None is unknown.
    """

    round: int
    layout: Layout
    codec: Codec
    own: Sequence[Honest]
    others: Sequence[Honest]
    earlier: Mapping[int, bytes]
    rng: np.random.Generator
    defence: Defence | None = None


class Attack(abc.ABC):
    """What hostile clients do; frozen, registered, chosen by ``attack=``.

    Attributes:
      fraction: Of the federation's clients that are hostile; which ones follows from the seed.
    """

    group: ClassVar[str] = "attack"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"attack.fraction must lie in [0, 1), not {self.fraction}")

    def hostile(self, clients: int, seed: int) -> list[int]:
        """Return the places of the hostile clients among all, sorted."""
        count = round(self.fraction * clients)
        chosen = generator(derive(seed, "attack")).choice(clients, count, replace=False)
        return sorted(chosen.tolist())

    def poison(self, x: Inputs, y: Labels, client: Accomplice) -> tuple[Inputs, Labels]:
        """Return the rows that a hostile client trains on, given its own; neither is written to.

        Args:
          x: (n, ...) channels first.
          y: (n,).
          client: Who it is.
        """
        return x, y

    def probe(
        self, x: Inputs, y: Labels, classes: int, high: float
    ) -> tuple[Inputs, Labels] | None:
        """Return by what the attack is judged, of the test examples; None for all but backdoors.

        Inputs with the trigger, and what the attacker wants them taken for: the share of them that
        the deployed model takes for it is the attack's success rate.

        Raises:
          ConfigError: If the task has no such class, or no example to show the trigger on.
        """
        return None

    def forge(self, view: View) -> list[bytes]:
        """Return the sealed message of each of ``view.own``; as it is, unless overridden."""
        return [wire.seal(reply.message) for reply in view.own]


class VectorAttack(Attack):
    """An attack that chooses deltas; they are encoded as an honest client would.

    Attributes:
      strength: The option that says how far it goes, which ``adaptive`` tunes; empty if none does.
    """

    strength: ClassVar[str] = ""

    @abc.abstractmethod
    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        """Return what the attackers send.

        Args:
          own: (m, d) float64, what they would have sent, m >= 1.
          others: (h, d) float64, what honest clients send; h may be 0.
          rng: Of this round.

        Returns:
          (m, d), or (d,) for all alike.
        """

    def harm(self, result: Vector, own: Rows, others: Rows) -> float:
        """Return how well an aggregate serves the attackers: its distance from the honest mean.

        The objective of Shejwalkar and Houmansadr 2021, eq. (1).
        """
        return float(np.linalg.norm(result - moments(others, own)[0]))

    def forge(self, view: View) -> list[bytes]:
        """Return messages with the chosen deltas."""
        deltas = self._deltas(*deltas_of(view), view.rng)
        deltas = np.broadcast_to(deltas, (len(view.own), view.layout.size))
        return [sealed(view, reply, row) for reply, row in zip(view.own, deltas, strict=True)]


class PayloadAttack(Attack):
    """An attack on the bytes of each hostile client's own reply."""

    @abc.abstractmethod
    def _rewrite(self, reply: Honest, view: View) -> bytes:
        """Return the sealed message that a client sends in place of its reply."""

    def forge(self, view: View) -> list[bytes]:
        """Return the rewritten messages."""
        return [self._rewrite(reply, view) for reply in view.own]


def deltas_of(view: View) -> tuple[Rows, Rows]:
    """Return what the attackers would have sent, (m, d), and what the honest send, (h, d)."""
    own, others = (
        np.array([reply.delta for reply in replies], np.float64).reshape(-1, view.layout.size)
        for replies in (view.own, view.others)
    )
    return own, others


def encoded(view: View, reply: Honest, delta: Any) -> bytes:
    """Encode another delta than a reply's with the seed that the server expects."""
    limit = np.finfo(np.float32).max
    values = np.clip(np.asarray(delta), -limit, limit).astype(np.float32)
    return view.codec.encode(values, view.layout, reply.seed)


def sealed(view: View, reply: Honest, delta: Any) -> bytes:
    """Seal a reply with another delta."""
    return resealed(reply, encoded(view, reply, delta))


def resealed(reply: Honest, payload: bytes, **metadata: Any) -> bytes:
    """Seal a reply with another delta payload, and metadata on top."""
    message = reply.message
    return wire.seal(wire.Envelope({**message.metadata, **metadata}, [payload, *message.parts[1:]]))


def moments(others: Rows, own: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return coordinate-wise mean and deviation of the honest deltas, or of their own."""
    rows = others if len(others) else own
    return rows.mean(axis=0), rows.std(axis=0)
