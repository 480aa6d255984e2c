"""Rate control: the step of a codec that meets a target in bits or in error."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import numpy as np

from fedq import wire
from fedq.codecs.base import Codec
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector

#: Steps below this fraction of the largest magnitude would exceed what integers hold.
FINEST = 2.0**-20
_PROBES = 2


#: From a step to expected bits and expected squared error.
Forecast = Callable[[float], tuple[float, float]]


class RateCodec(Codec):
    """A codec with one step, which is given or found.

    Subclasses declare the fields ``bits``, ``nmse`` and ``step``. The first that is not zero of
    ``step``, ``nmse`` and ``bits`` counts. The step must not depend on the randomness that the
    final encoding uses, or dither would no longer be unbiased: probes draw their own.
    """

    bits: float
    nmse: float
    step: float

    def __post_init__(self) -> None:
        """Refuse targets out of range."""
        super().__post_init__()
        if not 0 <= self.bits <= 16:
            raise ConfigError(f"codec.bits must be from 0 to 16 per parameter, not {self.bits}")
        if not 0 <= self.nmse < math.inf or not 0 <= self.step < math.inf:
            raise ConfigError("codec.nmse and codec.step must be 0 (off) or positive")
        if self.nmse and self.step:
            raise ConfigError("set codec.nmse or codec.step, not both")
        if not (self.bits or self.nmse or self.step):
            raise ConfigError("set one of codec.bits, codec.nmse and codec.step")

    @abc.abstractmethod
    def _encode_at(self, x: Vector, layout: Layout, seed: int, step: float) -> bytes:
        """Encode at a step; the same bytes as ``_encode`` once that has found the step."""

    @abc.abstractmethod
    def _forecast(self, x: Vector, layout: Layout) -> Forecast:
        """Return a function from the step to expected bits and expected squared error."""

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        largest = float(np.abs(x).max(initial=0))
        if not largest:
            return self._encode_at(x, layout, seed, 0.0)
        floor = max(largest * FINEST, 1e-44)
        if self.step:
            return self._encode_at(x, layout, seed, max(self.step, floor))
        power = float(np.square(x, dtype=np.float64).sum())
        unit = math.sqrt(power / x.size)
        forecast = self._forecast(x, layout)
        if self.nmse:
            step = _solve(lambda s: forecast(s)[1], self.nmse * power, unit, 1)
            return self._encode_at(x, layout, seed, max(step, floor))
        header = 8 * len(wire.seal_frame(self, layout, seed, b""))
        target = max(self.bits * x.size - header, self.bits * x.size / 2)
        step = self._meet(x, layout, target, unit, floor, lambda s: forecast(s)[0])
        return self._encode_at(x, layout, seed, step)

    def _meet(
        self,
        x: Vector,
        layout: Layout,
        target: float,
        unit: float,
        floor: float,
        expected: Callable[[float], float],
    ) -> float:
        """Return the step at which encoding takes about ``target`` bits."""
        step = max(_solve(expected, target, unit, -1), floor)
        known: tuple[float, float] | None = None
        for probe in range(_PROBES):
            bits = 8 * len(self._encode_at(x, layout, ~probe, step))
            place, miss = math.log2(step), math.log2(bits / target)
            if abs(miss) < 0.002:
                break
            if known is not None and abs(place - known[0]) > 1e-6 and miss != known[1]:
                slope = (miss - known[1]) / (place - known[0])
            else:
                near, far = expected(step), expected(step * 1.1)
                slope = math.log2(far / near) / math.log2(1.1) if far < near else -1.0
            known = place, miss
            slope = min(max(slope, -4.0), -0.2)
            step = max(2.0 ** (place - min(max(miss / slope, -3.0), 3.0)), floor)
        return step


def _solve(value: Callable[[float], float], target: float, unit: float, sign: int) -> float:
    """Return the step at which a monotone function (rising if ``sign`` > 0) meets the target."""
    low, high = math.log2(unit) - 24, math.log2(unit) + 12
    for _ in range(24):
        middle = (low + high) / 2
        if (value(2.0**middle) < target) == (sign > 0):
            low = middle
        else:
            high = middle
    return float(2.0 ** ((low + high) / 2))
