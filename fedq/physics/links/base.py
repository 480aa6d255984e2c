"""What a link is: how long bytes take over it, and what the device's radio draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedq.errors import ConfigError
from fedq.physics.devices.base import check_positive
from fedq.random import generator


@dataclass(frozen=True)
class Transfer:
    """What one message took.

    Attributes:
      seconds: From its first bit to its last.
      joules: Of the device's radio.
      sent_bytes: On the air, with headers and repetitions.
    """

    seconds: float
    joules: float
    sent_bytes: int


class Link:
    """A device's link to the server.

    A message of n bytes goes in ``ceil(n / packet_bytes)`` packets, each with a header, and each
    repeated until it arrives; the number of sendings of a packet is geometric::

        seconds = latency + sum over sendings of 8 (header + bytes) / rate / duty cycle
        joules  = wake_joules + watts * (the same sum without the duty cycle)

    Attributes:
      downlink_mbps: Server to device, decimal megabits a second.
      uplink_mbps: Device to server.
      latency_s: One way, per message.
      loss: Probability that a packet is lost, in [0, 1).
      packet_bytes: Payload of a packet at most.
      header_bytes: What goes with each packet.
      downlink_duty: Share of time in which the server may send, in (0, 1].
      uplink_duty: Share of time in which the device may send.
      receive_watts: Drawn by the radio while it receives.
      transmit_watts: Drawn by the radio while it sends.
      wake_joules: Per message: to connect, and to stay awake after it.
    """

    group: ClassVar[str] = "link"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    downlink_mbps: float
    uplink_mbps: float
    latency_s: float
    loss: float
    packet_bytes: int
    header_bytes: int
    downlink_duty: float
    uplink_duty: float
    receive_watts: float
    transmit_watts: float
    wake_joules: float

    def __post_init__(self) -> None:
        what = f"link={self.name}"
        check_positive(what, self, "downlink_mbps", "uplink_mbps", "packet_bytes")
        for option in (
            *("latency_s", "header_bytes"),
            *("receive_watts", "transmit_watts", "wake_joules"),
        ):
            value = getattr(self, option)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{what}: {option} must be 0 or more, not {value}")
        if not 0 <= self.loss < 1:
            raise ConfigError(f"{what}: loss must be in [0, 1), not {self.loss}")
        for option in ("downlink_duty", "uplink_duty"):
            if not 0 < getattr(self, option) <= 1:
                raise ConfigError(
                    f"{what}: {option} must be in (0, 1], not {getattr(self, option)}"
                )

    def down(self, count: int, seed: int) -> Transfer:
        """Return what it takes to receive ``count`` bytes."""
        return self._transfer(
            count, seed, self.downlink_mbps, self.downlink_duty, self.receive_watts
        )

    def up(self, count: int, seed: int) -> Transfer:
        """Return what it takes to send ``count`` bytes; with one seed, more bytes take longer."""
        return self._transfer(count, seed, self.uplink_mbps, self.uplink_duty, self.transmit_watts)

    def _transfer(self, count: int, seed: int, mbps: float, duty: float, watts: float) -> Transfer:
        sent = self._on_air(count, seed)
        air_s = 8e-6 * sent / mbps
        return Transfer(self.latency_s + air_s / duty, self.wake_joules + watts * air_s, sent)

    def _on_air(self, count: int, seed: int) -> int:
        packets = -(-count // self.packet_bytes)
        plain = count + packets * self.header_bytes
        if not packets or not self.loss:
            return plain
        # Drawn one by one in order: a longer message sees the losses of a shorter one, and more.
        again = generator(seed).geometric(1 - self.loss, packets) - 1
        size = self.packet_bytes + self.header_bytes
        last = count - (packets - 1) * self.packet_bytes + self.header_bytes
        return plain + int(np.sum(again[:-1])) * size + int(again[-1]) * last
