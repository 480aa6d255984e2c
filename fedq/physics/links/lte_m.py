"""LTE-M (LTE Cat-M1)."""

from __future__ import annotations

from fedq.physics.links.base import Link
from fedq.registry import register


@register("link", "lte_m")
class LteM(Link):
    """LTE Cat-M1, half duplex, in good coverage.

    Rates: 300 and 375 kbit/s, half duplex with scheduling delays, 3GPP release 13
    (rfwireless-world.com, "LTE-M device categories"). Latency 15 ms (blog.mbedded.ninja, "Cellular
    communication protocols"). Transmit: 105 mA at 3.7 V, 23 dBm (nRF9160 product specification,
    modem current). Wake: 105 mJ, its tracking-area update. Receive 0.2 W and loss are estimates.
    """

    downlink_mbps: float = 0.300
    uplink_mbps: float = 0.375
    latency_s: float = 0.015
    loss: float = 0.01
    packet_bytes: int = 1358
    header_bytes: int = 40
    downlink_duty: float = 1.0
    uplink_duty: float = 1.0
    receive_watts: float = 0.2
    transmit_watts: float = 0.39
    wake_joules: float = 0.105
