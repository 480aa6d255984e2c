"""The virtual clock: bytes and multiply-accumulates into seconds and joules, deterministic.

Everything random about an exchange follows from the run's seed, the round, the client and what it
is for, so neither the order of work nor the number of workers changes a digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from fedq.capacity import Capacities, Capacity
from fedq.errors import FedqError
from fedq.physics.fleets.base import Fleet, Member
from fedq.physics.links.base import Transfer
from fedq.random import derive, generator

#: Simulated seconds after which a run gives up waiting for anybody to be there.
PATIENCE_S = 30 * 86_400.0


@dataclass(frozen=True)
class Energy:
    """What an exchange took of a device's battery, in joules.

    Attributes:
      training: By the board while it trained.
      radio: By the radio while it sent and received.
      waiting: By the board meanwhile.
    """

    training: float = 0.0
    radio: float = 0.0
    waiting: float = 0.0

    @property
    def joules(self) -> float:
        """All of it."""
        return self.training + self.radio + self.waiting


@dataclass(frozen=True)
class Exchange:
    """One request and its reply, on one device.

    Attributes:
      down: The request.
      train_s: Seconds of training, 0 for a message that asks for none.
      up: The reply, None while its length is not known or if there is none.
      idle_watts: Of the board.
      active_watts: Of the board.
    """

    down: Transfer
    train_s: float
    up: Transfer | None
    idle_watts: float
    active_watts: float

    @property
    def trained_s(self) -> float:
        """Seconds from the request's first bit to the end of training."""
        return self.down.seconds + self.train_s

    @property
    def seconds(self) -> float:
        """Seconds from the request's first bit to the reply's last."""
        return self.trained_s + (self.up.seconds if self.up else 0.0)

    def wire_bytes(self, until_s: float = math.inf) -> tuple[int, int]:
        """Return bytes on the air, up and down, until it was done or stopped ``until_s`` later."""
        down = _share(until_s, self.down.seconds) * self.down.sent_bytes
        if self.up is None:
            return 0, round(down)
        up = _share(until_s - self.trained_s, self.up.seconds) * self.up.sent_bytes
        return round(up), round(down)

    def energy(self, until_s: float = math.inf) -> Energy:
        """Return what it took until it was done, or was stopped ``until_s`` after it began."""
        parts = [(self.down, 0.0)]
        if self.up:
            parts.append((self.up, self.trained_s))
        radio = waiting = 0.0
        for transfer, start_s in parts:
            share = _share(until_s - start_s, transfer.seconds)
            radio += share * transfer.joules
            waiting += share * transfer.seconds * self.idle_watts
        trained = _share(until_s - self.down.seconds, self.train_s) * self.train_s
        return Energy(trained * self.active_watts, radio, waiting)


def _share(spent_s: float, whole_s: float) -> float:
    """Return which part of ``whole_s`` is over when ``spent_s`` are."""
    if spent_s >= whole_s:
        return 1.0
    return max(spent_s, 0.0) / whole_s


class Clock:
    """Time and energy of a fleet's clients; a client is its place in the federation.

    Args:
      fleet: Their devices and links.
      seed: Of the run.
      macs: Multiply-accumulates of a client's training in a round, forward and backward passes, by
        place.

    Example:
      >>> from fedq.registry import build
      >>> fleet = build("fleet", "mixture", devices=["pi_4"], links=["wifi"])
      >>> exchange = Clock(fleet, 0, [1.2e9]).exchange(0, 1, down_bytes=10**6, up_bytes=10**4)
      >>> exchange.train_s, round(exchange.down.seconds, 2)
      (1.0, 0.22)
    """

    def __init__(self, fleet: Fleet, seed: int, macs: ArrayLike) -> None:
        self.fleet, self._seed, self._macs = fleet, seed, np.asarray(macs, np.float64)

    @cached_property
    def members(self) -> Sequence[Member]:
        """Devices and links by place."""
        return self.fleet.members(len(self._macs), self._seed)

    @cached_property
    def capacities(self) -> Capacities:
        """What devices and links are made for, by place."""
        return Capacities(
            {
                place: Capacity(member.link.uplink_mbps, member.device.training_macs_s)
                for place, member in enumerate(self.members)
            }
        )

    @property
    def always(self) -> bool:
        """Whether all clients are there all the time."""
        return self.fleet.availability.slot_s is None

    def available(self, place: int, seconds: float) -> bool:
        """Whether a client can be asked at a time."""
        return self.fleet.availability.available(place, seconds, self._seed)

    def opens(self, seconds: float, wanted: Callable[[float], bool]) -> float:
        """Return the first time from ``seconds`` on for which ``wanted`` holds.

        Raises:
          FedqError: If nobody comes for a month.
        """
        slot_s = self.fleet.availability.slot_s
        start = seconds
        while not wanted(seconds):
            if slot_s is None or seconds - start > PATIENCE_S:
                raise FedqError(
                    f"no client was available for {PATIENCE_S / 86_400:.0f} simulated days; see "
                    "fleet.availability"
                )
            seconds = (math.floor(seconds / slot_s) + 1) * slot_s
        return seconds

    def dies(self, place: int, server_round: int) -> bool:
        """Whether a client that was asked in a round drops out of it."""
        draw = derive(self._seed, server_round, place, "dropout") / 2**63
        return draw < self.fleet.dropout

    def exchange(
        self,
        place: int,
        server_round: int,
        *,
        down_bytes: int,
        up_bytes: int | None = None,
        trains: bool = True,
        phase: int = 0,
    ) -> Exchange:
        """Return what a request and its reply take.

        Args:
          place: The client.
          server_round: In which it was asked.
          down_bytes: Length of the request.
          up_bytes: Length of the reply, None if there is none yet.
          trains: Whether the request asks for training.
          phase: Which of several requests of the round it is.
        """
        member = self.members[place]

        def seed(purpose: str) -> int:
            return derive(self._seed, server_round, place, phase, purpose)

        train_s = 0.0
        if trains:
            slow = generator(seed("straggler")).standard_normal() * self.fleet.straggler_sigma
            train_s = math.exp(slow) * float(self._macs[place]) / member.device.training_macs_s
        return Exchange(
            member.link.down(down_bytes, seed("down")),
            train_s,
            None if up_bytes is None else member.link.up(up_bytes, seed("up")),
            member.device.idle_watts,
            member.device.active_watts,
        )
