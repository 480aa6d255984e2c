"""Dithered trellis-coded quantization (dither: Ziv 1985; trellis: Ungerboeck 1982)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import random, wire
from fedq.codecs import _dither, _range, _scales
from fedq.codecs._hints import Hints
from fedq.codecs._rate import Forecast, SteppedCodec
from fedq.codecs._scales import Law, Profile, Scales
from fedq.codecs._trellis import ERROR, States, search, transitions
from fedq.errors import DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "dtcq")
class DTCQ(SteppedCodec):
    """Round ``x / step + u`` to a sequence of a trellis code, and subtract the dither u again.

    The code is invariant under shifts by 4, and u is uniform in (0, 4): so the error is independent
    of x, of mean zero (a common random sign removes what the start of the trellis leaves), and
    independent between clients. The error of a mean of n clients is 1/n of one client's.

    Rows and columns have scales, sent in half octaves. They set the step of each coordinate, and,
    where less than some two thirds of a bit would be spent on it, the chance p that it is sent at
    all; what is sent stands for ``x / p``. Which ones are sent follows from the seed and costs
    nothing. Coding is by context: rows, columns, and where zero lies between the levels; where all
    scales of each tensor are alike, the contexts are taken to be steady.

    A reference is a context, too: how large its coordinate is and of which sign. It need not be
    close, and steps and targets take no notice of it.

    Body: step, float32; length of the scales, varint; scales; range code of the integers.

    Args:
      bits: Target in bits per parameter, header included; met within 2 % by models of 100,000
        parameters or more.
      nmse: Target of ``E|y - x|^2 / |x|^2``; takes the place of ``bits``.
      step: The step itself, e.g. one shared by a cohort; takes the place of both.
      states: Of the trellis: 64 gain 0.17 dB over 8 and are searched ten times slower.
      sampling: Whether small coordinates are sampled. Without, all are sent, with the step of small
        ones following the cube root of their scale.

    Example:
      >>> layout, codec = Layout.flat(100_000), DTCQ(bits=2.0)
      >>> x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
      >>> payload = codec.encode(x, layout, seed=1)
      >>> abs(8 * len(payload) / 100_000 - 2) < 0.04
      True

    Reference:
      Ungerboeck 1982, "Channel coding with multilevel/phase signals"; Ziv 1985, "On universal
      quantization"; Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and
      Gauss-Markov sources".
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"bits": 2.0},
        {"nmse": 0.05, "states": 64},
        {"bits": 1.5, "sampling": False},
        {"step": 0.01},
    )

    bits: float = 1.0
    nmse: float = 0.0
    step: float = 0.0
    states: States = 8
    sampling: bool = True

    @property
    def unbiased(self) -> bool:
        """True: dither makes the error independent of ``x``."""
        return True

    @property
    def _law(self) -> Law:
        return _scales.law(self.sampling, ERROR[self.states])

    def max_body_bytes(self, layout: Layout) -> int:
        """A generous bound on the scales and on eight bytes per coordinate."""
        scales = sum(-(-size // width) + width + 1 for size, width in _scales.geometry(layout))
        return 4 + 10 + (4 * scales + 64) + _limit(layout)

    def _forecast(self, profile: Profile) -> Forecast:
        return lambda step: profile.expect(step, self._law, detail=self._law)

    def _error_at(
        self, x: Vector, profile: Profile, layout: Layout, seed: int, step: float
    ) -> float:
        """Return the expectation over dither and sampling: ``x^2 (1 / p - 1) + p error step^2``."""
        step = float(np.float32(step))
        law = self._law
        scales = profile.at(step, law)
        p = law.keep / _scales.WHOLE
        noise = p * ERROR[self.states] * np.square(law.multiplier * step)
        total, start = 0.0, 0
        for (size, _), rows, columns in zip(
            _scales.geometry(layout), scales.rows, scales.columns, strict=True
        ):
            total += _dither.expect(x[start : start + size], rows, columns, 1 / p - 1, noise)
            start += size
        return total

    def _encode_at(
        self,
        x: Vector,
        profile: Profile,
        layout: Layout,
        seed: int,
        step: float,
        hints: Hints | None = None,
    ) -> bytes:
        step = float(np.float32(step))
        head = struct.pack("<f", step)
        if not step:
            return head
        scales = profile.at(step, self._law)
        side = _scales.encode(scales, layout)
        plan = _Plan.of(self, scales, layout, seed, step)
        y = np.empty(plan.sent, np.float32)
        law = self._law
        inverse = plan.sign / (law.multiplier * (law.keep / _scales.WHOLE) * step)
        _dither.shift(x, plan.words, plan.place, plan.index, inverse, y)
        values = np.empty(x.size, np.int32)
        _dither.to_values(search(y, self.states), plan.place, values)
        body = _range.encode(
            values,
            _scales.geometry(layout),
            _limit(layout),
            plan.place,
            _dither.places(),
            transitions(self.states),
            hints,
            steady=scales.even,
        )
        assert body is not None
        return head + wire.varint(len(side)) + side + body

    def _decode(
        self, body: memoryview, layout: Layout, seed: int, hints: Hints | None = None
    ) -> Vector:
        reader = wire.Reader(body)
        (step,) = struct.unpack("<f", reader.take(4))
        if not 0 <= step < float("inf"):
            raise DecodeError(f"a step of {step}")
        if step == 0:
            reader.end()
            return np.zeros(layout.size, np.float32)
        scales = _scales.decode(reader.take(reader.varint()), layout)
        plan = _Plan.of(self, scales, layout, seed, step)
        trellis = transitions(self.states)
        values = _range.decode(
            reader.rest(),
            _scales.geometry(layout),
            plan.place,
            _dither.places(),
            trellis,
            hints,
            steady=scales.even,
        )
        out = np.empty(layout.size, np.float32)
        steps = self._law.multiplier * (step * plan.sign)
        _dither.restore(values, plan.words, plan.place, plan.index, steps, trellis, out)
        return out


def _limit(layout: Layout) -> int:
    return 8 * layout.size + 64


@dataclass(frozen=True)
class _Plan:
    """What both ends know of every coordinate before the integers are coded."""

    words: NDArray[np.uint32]
    place: NDArray[np.uint8]
    index: NDArray[np.uint8]
    sent: int
    sign: float

    @classmethod
    def of(cls, codec: DTCQ, scales: Scales, layout: Layout, seed: int, step: float) -> _Plan:
        words = random.words(seed, layout.size, "dtcq")
        place = np.empty(layout.size, np.uint8)
        index = np.empty(layout.size, np.uint8)
        sent = start = 0
        for (size, _), rows, columns in zip(
            _scales.geometry(layout), scales.rows, scales.columns, strict=True
        ):
            sent += _dither.classify(
                words, rows, columns, size, codec._law.keep, start, place, index
            )
            start += size
        sign = 1.0 - 2.0 * (int(random.words(seed, 1, "dtcq sign")[0]) & 1)
        return cls(words, place, index, sent, sign)
