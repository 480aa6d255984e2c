"""Microcontrollers."""

from __future__ import annotations

from fedq.physics.devices.base import Device
from fedq.registry import register


@register("device", "microcontroller")
class Microcontroller(Device):
    """A Cortex-M7 class microcontroller at 480 MHz, training in float32.

    All estimates: 0.05 multiply-accumulates per cycle. Optimised kernels on eight RISC-V cores
    reach 3.11 in float16, "more than two orders of magnitude" above frameworks for one core
    (Nadalini et al. 2023, arXiv 2305.19167). It trains what fits its memory; that is not checked.
    """

    training_macs_s: float = 24e6
    idle_watts: float = 0.05
    active_watts: float = 0.45
