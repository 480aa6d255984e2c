"""Rate-distortion optimised trellis-coded quantization (Fischer and Wang 1992), with gain."""

from __future__ import annotations

import struct
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import wire
from fedq.codecs import _range, _rdo, _scales
from fedq.codecs._hints import Hints
from fedq.codecs._rate import Forecast, SteppedCodec
from fedq.codecs._scales import Profile
from fedq.codecs._trellis import States, transitions
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

_MOST = 4.0  # of the gain


@register("codec", "rdo_tcq")
class RDOTCQ(SteppedCodec):
    """Choose, of all sequences of a trellis code, one of least ``error + weight step^2 bits``.

    Levels are even or odd multiples of the step as the state says, and zero in either case, as most
    coordinates of an update are worth no bit. Viterbi's search adds what a level would cost in its
    context, estimated in a first pass. What is decoded is multiplied by the gain
    ``|x|^2 / <x, y>``, so that its component along ``x`` is ``x``: the small coordinates are lost,
    but the mean of many clients does not shrink.

    The weight of least error for one vector is 0.36. A mean over clients wants less, since the same
    small coordinates are lost by all: 0.1.

    Body: step and gain, float32; range code of the levels.

    Args:
      bits: Target in bits per parameter, header included.
      nmse: Target of ``|y - x|^2 / |x|^2``, before the gain; takes the place of ``bits``.
      step: The step itself; takes the place of both.
      weight: Of bits against error.
      gain: Whether to correct the gain.
      states: Of the trellis.

    Example:
      >>> layout, codec = Layout.flat(50_000), RDOTCQ(bits=0.5)
      >>> x = np.random.default_rng(0).laplace(size=50_000).astype(np.float32)
      >>> y = codec.decode(codec.encode(x, layout), layout)
      >>> abs(float(x @ y) / float(x @ x) - 1) < 1e-3
      True

    Reference:
      Fischer and Wang 1992, "Entropy-constrained trellis-coded quantization"; Ungerboeck 1982 (the
      trellis); Vargaftik et al. 2022, "EDEN", section 3 (the gain).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"bits": 1.0},
        {"nmse": 0.1, "gain": False, "states": 64},
    )

    bits: float = 0.1
    nmse: float = 0.0
    step: float = 0.0
    weight: float = 0.1
    gain: bool = True
    states: States = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 10:
            raise ConfigError(f"codec.weight must be from 0 to 10, not {self.weight}")

    @property
    def unbiased(self) -> bool:
        """False: small coordinates are lost."""
        return False

    def max_body_bytes(self, layout: Layout) -> int:
        """A generous bound, eight bytes per coordinate."""
        return 8 + 8 * layout.size + 64

    def _forecast(self, profile: Profile) -> Forecast:
        return lambda step: profile.expect(step, _rdo.law())

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
        if not step:
            return bytes(8)
        y = (x / np.float64(step)).astype(np.float32)
        tensors = _scales.geometry(layout)
        values = _rdo.quantize(y, tensors, self.weight, self.states)
        out = np.empty(x.size, np.float32)
        _rdo.restore(values, transitions(self.states), 1.0, out)
        along = float(y.astype(np.float64) @ out)
        power = float(y.astype(np.float64) @ y)
        gain = min(power / along, _MOST) if self.gain and along > 0 else 1.0
        place = np.zeros(x.size, np.uint8)
        body = _range.encode(
            values,
            tensors,
            self.max_body_bytes(layout) - 8,
            place,
            _rdo.places(),
            transitions(self.states),
            hints,
        )
        assert body is not None
        return struct.pack("<ff", step, gain) + body

    def _decode(
        self, body: memoryview, layout: Layout, seed: int, hints: Hints | None = None
    ) -> Vector:
        reader = wire.Reader(body)
        step, gain = struct.unpack("<ff", reader.take(8))
        if step == 0 and gain == 0:
            reader.end()
            return np.zeros(layout.size, np.float32)
        if not (0 < step < float("inf") and 0 < gain <= _MOST):
            raise DecodeError(f"a step of {step} or a gain of {gain}")
        values = _range.decode(
            reader.rest(),
            _scales.geometry(layout),
            np.zeros(layout.size, np.uint8),
            _rdo.places(),
            transitions(self.states),
            hints,
        )
        out: NDArray[np.float32] = np.empty(layout.size, np.float32)
        _rdo.restore(values, transitions(self.states), step * gain, out)
        return out
