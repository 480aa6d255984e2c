"""Wi-Fi at home or in a hall."""

from __future__ import annotations

from fedq.physics.links.base import Link
from fedq.registry import register


@register("link", "wifi")
class WiFi(Link):
    """802.11n at 2.4 GHz on a small board, behind a home's uplink.

    Rates of 40 and 20 Mbit/s, 5 ms, one packet of a hundred lost, and 0.5 and 0.7 W beyond the idle
    board are estimates. Packets of 1460 bytes: TCP over Ethernet frames, 78 bytes of headers.
    """

    downlink_mbps: float = 40.0
    uplink_mbps: float = 20.0
    latency_s: float = 0.005
    loss: float = 0.01
    packet_bytes: int = 1460
    header_bytes: int = 78
    downlink_duty: float = 1.0
    uplink_duty: float = 1.0
    receive_watts: float = 0.5
    transmit_watts: float = 0.7
    wake_joules: float = 0.0
