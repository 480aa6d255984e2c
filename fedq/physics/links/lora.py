"""LoRa-class links."""

from __future__ import annotations

from fedq.physics.links.base import Link
from fedq.registry import register


@register("link", "lora")
class Lora(Link):
    """LoRaWAN, EU868, data rate 5 (spreading factor 7, 125 kHz), one device to itself.

    5470 bit/s and packets of 222 bytes (LoRaWAN regional parameters, data rate 5), 13 bytes of
    headers. Duty cycle 1 % up and 10 % down (ETSI EN 300 220, bands M and P). Receive: 10.8 mA at
    3.3 V; transmit: 29 mA at 13 dBm (Semtech SX1276 data sheet). Latency 1 s: the delay of the
    first receive window. A loss of 5 % is an estimate. Networks of several devices share the
    gateway's downlink, which is not modelled.
    """

    downlink_mbps: float = 0.00547
    uplink_mbps: float = 0.00547
    latency_s: float = 1.0
    loss: float = 0.05
    packet_bytes: int = 222
    header_bytes: int = 13
    downlink_duty: float = 0.1
    uplink_duty: float = 0.01
    receive_watts: float = 0.036
    transmit_watts: float = 0.096
    wake_joules: float = 0.0
