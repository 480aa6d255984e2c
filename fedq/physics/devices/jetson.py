"""NVIDIA Jetson boards."""

from __future__ import annotations

from fedq.physics.devices.base import Device
from fedq.registry import register


@register("device", "jetson_nano")
class JetsonNano(Device):
    """Jetson Nano: 128 Maxwell cores, 4 GB, in its 10 W mode.

    Peak 236 GFLOP/s in float32 (half of the 472 in float16 of NVIDIA's data sheet), 118e9
    multiply-accumulates a second, of which batches of ten small images reach a twentieth: an
    estimate. Active 10 W: the power budget of mode MAXN (NVIDIA, "Jetson Nano: power management").
    Idle 2 W: an estimate.
    """

    training_macs_s: float = 5.9e9
    idle_watts: float = 2.0
    active_watts: float = 10.0
