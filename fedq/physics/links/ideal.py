"""No link at all: bytes arrive at once and cost nothing."""

from __future__ import annotations

from fedq.physics.links.base import Link
from fedq.registry import register


@register("link", "ideal")
class Ideal(Link):
    """A link without delay, loss or energy, to see a fleet's computing alone."""

    downlink_mbps: float = 1e12
    uplink_mbps: float = 1e12
    latency_s: float = 0.0
    loss: float = 0.0
    packet_bytes: int = 1 << 30
    header_bytes: int = 0
    downlink_duty: float = 1.0
    uplink_duty: float = 1.0
    receive_watts: float = 0.0
    transmit_watts: float = 0.0
    wake_joules: float = 0.0
