"""Rate control: the step of a codec that meets a goal in bits or in error."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedq import wire
from fedq.codecs._hints import Hints, hints
from fedq.codecs._scales import Profile
from fedq.codecs.base import Codec
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector

#: From a step to expected bits and expected squared error.
Forecast = Callable[[float], tuple[float, float]]

#: Steps below this fraction of the largest magnitude would exceed what integers hold.
_FINEST = 2.0**-20
_SMALLEST, _LARGEST = 1e-44, 2.0**125
#: As many probes are made, and more only where the rate falls off a cliff.
_PROBES, _MOST_PROBES = 3, 8
_CLOSE, _NEAR = 0.01, 0.05  # octaves: nothing is gained by another probe; the slope does the rest


@dataclass(frozen=True)
class Goal:
    """What a body is to meet; one of the three is not None.

    Attributes:
      step: The step itself.
      error: Expected squared error.
      bits: Of the body.
    """

    step: float | None = None
    error: float | None = None
    bits: float | None = None

    def less(self, spent_bytes: int) -> Goal:
        """Return what is left of the goal when some bytes are spent, at least an eighth."""
        if self.bits is None:
            return self
        return dataclasses.replace(self, bits=max(self.bits - 8 * spent_bytes, self.bits / 8))

    def solve(self, forecast: Forecast, x: Vector) -> float:
        """Return the step that is expected to meet the goal for ``x``; 0 if that is all zero."""
        largest = float(np.abs(x).max(initial=0))
        if not largest:
            return 0.0
        if self.step is not None:
            step = self.step
        elif self.error is not None:
            step = _bisect(lambda s: forecast(s)[1], self.error, x, 1)
        else:
            assert self.bits is not None
            step = _bisect(lambda s: forecast(s)[0], self.bits, x, -1)
        return _bounded(step, largest)


def _bounded(step: float, largest: float) -> float:
    """Keep what is decoded, x and a few steps, within float32, and integers within their range."""
    return max(min(step, _LARGEST - largest / 8), largest * _FINEST, _SMALLEST)


def _bisect(value: Callable[[float], float], target: float, x: Vector, sign: int) -> float:
    """Return the step at which a monotone function (rising if ``sign`` > 0) meets the target.

    Half octaves are searched, as scales are rounded to them; between two, logarithms are straight.
    """
    unit = math.sqrt(float(np.square(x, dtype=np.float64).mean()))

    def at(place: int) -> float:
        return value(unit * 2.0 ** (place / 2))

    low, high = -48, 24
    if sign < 0:  # where even coarse steps take more, those that hardly take more than the coarsest
        target = max(target, 1.05 * at(high))
    while high - low > 1:
        middle = (low + high) // 2
        if (at(middle) < target) == (sign > 0):
            low = middle
        else:
            high = middle
    ends = at(low), at(high)
    share = 0.5
    if min(ends) > 0 and ends[0] != ends[1]:
        share = math.log2(target / ends[0]) / math.log2(ends[1] / ends[0])
    return float(unit * 2.0 ** ((low + min(max(share, 0.0), 1.0)) / 2))


class RateCodec(Codec):
    """A codec that meets a goal: ``bits`` per parameter, a relative error, or a step.

    Subclasses declare the fields ``bits``, ``nmse`` and ``step``. The first that is not zero of
    ``step``, ``nmse`` and ``bits`` counts.
    """

    bits: float
    nmse: float
    step: float

    def __post_init__(self) -> None:
        """Refuse goals out of range."""
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
    def _encode_to(self, x: Vector, layout: Layout, seed: int, goal: Goal) -> bytes:
        """Encode towards a goal."""

    def _goal(self, x: Vector, layout: Layout, seed: int) -> Goal:
        if self.step:
            return Goal(step=self.step)
        if self.nmse:
            return Goal(error=self.nmse * float(np.square(x, dtype=np.float64).sum()))
        header = 8 * len(wire.seal_frame(self, layout, seed, b""))
        return Goal(bits=max(self.bits * x.size - header, self.bits * x.size / 2))

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        return self._encode_to(x, layout, seed, self._goal(x, layout, seed))


class SteppedCodec(RateCodec):
    """A codec whose one step decides its rate.

    The step does not depend on the randomness that the final encoding uses, or dither would no
    longer be unbiased: probes draw their own. Nor does it depend on a reference, which is a context
    to the coder and no more: what is decoded would change with it.
    """

    @property
    def predictive(self) -> bool:
        """True: where a reference is large, so may be a vector, and often with its sign."""
        return True

    @abc.abstractmethod
    def _forecast(self, profile: Profile) -> Forecast:
        """Return a function from the step to expected bits and expected squared error."""

    @abc.abstractmethod
    def _encode_at(
        self,
        x: Vector,
        profile: Profile,
        layout: Layout,
        seed: int,
        step: float,
        hints: Hints | None = None,
    ) -> bytes:
        """Encode a vector of this profile at a step; at 0 an all-zero vector."""

    @abc.abstractmethod
    def _decode(
        self, body: memoryview, layout: Layout, seed: int, hints: Hints | None = None
    ) -> Vector:
        """As in :class:`Codec`, given the hints that the encoder had."""

    def _encode_beside(self, x: Vector, reference: Vector, layout: Layout, seed: int) -> bytes:
        goal = self._goal(x, layout, seed)
        return self._encode_to(x, layout, seed, goal, hints(reference, layout))

    def _decode_beside(
        self, body: memoryview, reference: Vector, layout: Layout, seed: int
    ) -> Vector:
        return self._decode(body, layout, seed, hints(reference, layout))

    def _encode_to(
        self, x: Vector, layout: Layout, seed: int, goal: Goal, hints: Hints | None = None
    ) -> bytes:
        profile = Profile(x, layout)
        step = goal.solve(self._forecast(profile), x)
        if step and goal.bits is not None:
            step = self._probe(x, profile, layout, 0, goal.bits, step)
        elif step and goal.error is not None:
            step = self._probe(x, profile, layout, 1, goal.error, step)
        return self._encode_at(x, profile, layout, seed, step, hints)

    def _bits_at(
        self, x: Vector, profile: Profile, layout: Layout, seed: int, step: float
    ) -> float:
        """Return the bits of encoding at a step."""
        return 8.0 * len(self._encode_at(x, profile, layout, seed, step))

    def _error_at(
        self, x: Vector, profile: Profile, layout: Layout, seed: int, step: float
    ) -> float:
        """Return the squared error of encoding at a step, or its expectation."""
        body = self._encode_at(x, profile, layout, seed, step)
        error = self._decode(memoryview(body), layout, seed) - x.astype(np.float64)
        return float(error @ error)

    def _probe(
        self, x: Vector, profile: Profile, layout: Layout, what: int, target: float, step: float
    ) -> float:
        """Return a better step, from what is measured at a few: 0 is bits, 1 is the error."""
        forecast = self._forecast(profile)
        measure = self._error_at if what else self._bits_at
        known: tuple[float, float] | None = None
        largest = float(np.abs(x).max())
        sign = (-1.0, 1.0)[what]
        low, high = -math.inf, math.inf  # places known to be too low and too high
        for probe in range(_MOST_PROBES):
            measured = measure(x, profile, layout, ~probe, step)
            place, miss = math.log2(step), math.log2(max(measured, target / 1024) / target)
            if abs(miss) < _CLOSE:
                break
            low, high = (low, place) if sign * miss > 0 else (place, high)
            if (
                known is not None
                and what == 0
                and place > known[0] + 0.5
                and miss > known[1] - 0.05
            ):
                step = 2.0 ** known[0]  # out of reach: a coarser step saves nothing
                break
            # Scales are in half octaves: a forecast has no slope over less.
            near, far = forecast(step)[what], forecast(2 * step)[what]
            slope = math.log2(far / near) if near > 0 and far > 0 else sign
            slope = sign * min(max(sign * slope, 0.2), 4.0)
            if known is not None and abs(place - known[0]) > 1e-6:
                secant = (miss - known[1]) / (place - known[0])
                if 0.4 < secant / slope < 2.5:  # else what lies between is no line
                    slope = secant
            known = place, miss
            place -= min(max(miss / slope, -3.0), 3.0)
            if not low < place < high:
                place = (low + high) / 2
            before, step = step, _bounded(2.0**place, largest)
            if step == before or (probe + 1 >= _PROBES and abs(miss) < _NEAR):
                break
        return step
