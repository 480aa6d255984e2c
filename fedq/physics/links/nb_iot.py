"""NB-IoT (LTE Cat-NB1)."""

from __future__ import annotations

from fedq.physics.links.base import Link
from fedq.registry import register


@register("link", "nb_iot")
class NbIot(Link):
    """LTE Cat-NB1 in good coverage.

    Rates 26 and 62 kbit/s, latency 1.6 s, the best of "1.6-10 s" (blog.mbedded.ninja, "Cellular
    communication protocols"). Wake: 550 mJ, a tracking-area update (nRF9160 product specification,
    modem current). Transmit 0.72 W and receive 0.21 W at 23 dBm are estimates after Lauridsen et
    al. 2018, "An empirical NB-IoT power consumption model for battery lifetime estimation"; loss is
    an estimate.
    """

    downlink_mbps: float = 0.026
    uplink_mbps: float = 0.062
    latency_s: float = 1.6
    loss: float = 0.02
    packet_bytes: int = 1358
    header_bytes: int = 40
    downlink_duty: float = 1.0
    uplink_duty: float = 1.0
    receive_watts: float = 0.21
    transmit_watts: float = 0.72
    wake_joules: float = 0.55
