"""Raspberry Pi boards.

Power is of the whole board. Training rates are estimates, for there is no published figure: a Pi 4
core's peak in float32 is 6e9 multiply-accumulates a second (4 per cycle at 1.5 GHz), of which small
networks reach about a fifth; the other boards follow from single-core speeds in sysbench (Pi 3 B+
687, Pi 4 1478, Pi 5 2737 events a second: leoncode.co.uk, "Raspberry Pi CPU Benchmarks"), scaled by
clock to the Pi 3 B (1.2 of 1.4 GHz) and the Zero 2 W (1.0 of 1.4 GHz, the same core).
``fedq fleet bench`` measures a board of your own: ``device=measured``.
"""

from __future__ import annotations

from fedq.physics.devices.base import Device
from fedq.registry import register


@register("device", "pi_zero_2_w")
class PiZero2W(Device):
    """Raspberry Pi Zero 2 W: 4 Cortex-A53 at 1.0 GHz, 512 MB.

    Idle: 0.6 W (CNX Software, 2021-12-09). Active: 1.2 W of a Zero under load (pidramble.com) plus
    the 1.4 W that a Zero 2 W draws beyond a Zero W (andrejacobs.org, 2021-10-29).
    """

    training_macs_s: float = 0.40e9
    idle_watts: float = 0.6
    active_watts: float = 2.6


@register("device", "pi_3")
class Pi3(Device):
    """Raspberry Pi 3 B: 4 Cortex-A53 at 1.2 GHz, 1 GB.

    Idle 1.4 W, all cores busy 3.7 W (pidramble.com, "Power consumption benchmarks").
    """

    training_macs_s: float = 0.48e9
    idle_watts: float = 1.4
    active_watts: float = 3.7


@register("device", "pi_4")
class Pi4(Device):
    """Raspberry Pi 4 B: 4 Cortex-A72 at 1.5 GHz.

    Idle 2.7 W, all cores busy 6.4 W (pidramble.com, "Power consumption benchmarks").
    """

    training_macs_s: float = 1.2e9
    idle_watts: float = 2.7
    active_watts: float = 6.4


@register("device", "pi_5")
class Pi5(Device):
    """Raspberry Pi 5: 4 Cortex-A76 at 2.4 GHz.

    Idle 2.7 W and busy 8 W are estimates.
    """

    training_macs_s: float = 2.2e9
    idle_watts: float = 2.7
    active_watts: float = 8.0
