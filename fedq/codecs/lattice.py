"""A lattice that a model moves on: nearest levels with a dead zone about the last one sent."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq.codecs import _integers
from fedq.codecs._bits import packed_bytes
from fedq.codecs._groups import group_sizes, pieces, starts, to_float32
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.registry import register

_BITS = 16  # of a packed level
_TOP = (1 << _BITS - 1) - 1
_INDICES = -400, 256  # of steps: any float32 may be on a lattice


@register("codec", "lattice")
class Lattice(Codec):
    """Round to multiples of a step, and move on only when the last level is wrong.

    The step of a group is the one next to ``step`` times its root mean square, of a fixed series::

        s in {..., 1/2, 3/4, 1, 3/2, 2, 3, ...},  level = round(x / s),  y = level s

    A model that is sent again and again differs little from the last time. The series does not
    follow its scale from round to round, so a level is the same as long as its weight is; and
    :meth:`settle` leaves a level alone until the weight is more than ``1 / 2 + margin`` steps away,
    so that one on the border of two levels does not cost bits in every round. Beside a reference
    the differences of levels are coded, nearly all of them zero.

    The sender keeps what rounding takes, so a small drift is sent when it has become a step.

    Body: the step's place in the series per group, int16, even for ``2**(k / 2)``; then the levels,
    range-coded or, where that is shorter, packed in 16 bits.

    Args:
      step: Of the lattice, in root mean squares of a group; 1/64 to 4.
      margin: Of the dead zone, in steps beyond one half; 0 to 2.
      scale: Who shares a step. One for the whole ``model`` has the least squared error.

    Example:
      >>> layout = Layout.flat(4)
      >>> codec = Lattice(step=0.5)
      >>> x = np.array([1.0, -1.0, 0.3, 0.1], np.float32)
      >>> sent = codec.decode(codec.encode(x, layout), layout)
      >>> sent
      array([ 1.125, -1.125,  0.375,  0.   ], dtype=float32)
      >>> codec.settle(x + np.float32(0.2), sent, layout)
      array([ 1.125, -0.8  ,  0.375,  0.3  ], dtype=float32)

    Reference:
      Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian random variables",
      section II (dead zones); DoCoFL (Dorfman et al. 2023) for downlinks beside an older model.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"step": 0.1, "scale": "channel", "margin": 0.0},
    )

    step: float = 0.175
    margin: float = 0.1
    scale: Literal["model", "tensor", "channel"] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 / 64 <= self.step <= 4:
            raise ConfigError(f"codec.step must be in [1/64, 4], not {self.step}")
        if not 0 <= self.margin <= 2:
            raise ConfigError(f"codec.margin must be in [0, 2], not {self.margin}")

    @property
    def unbiased(self) -> bool:
        """False: rounding is to the nearest level."""
        return False

    @property
    def predictive(self) -> bool:
        """True: the reference's level is the likeliest."""
        return True

    def settle(self, x: Vector, previous: Vector, layout: Layout) -> Vector:
        """Return ``previous`` where it is near enough, else ``x``."""
        sizes = group_sizes(layout, self.scale, 0)
        reach = (0.5 + self.margin) * _steps(self._indices(x, sizes), sizes)
        near = np.abs(x.astype(np.float64) - previous) <= reach
        return np.where(near, previous, x)

    def max_body_bytes(self, layout: Layout) -> int:
        """Steps and packed levels."""
        return 2 * group_sizes(layout, self.scale, 0).size + packed_bytes(layout.size, _BITS)

    def _indices(self, x: Vector, sizes: NDArray[np.int64]) -> NDArray[np.int16]:
        if not sizes.size:
            return np.zeros(0, np.int16)
        wide = x.astype(np.float64)
        energy = np.add.reduceat(wide * wide, starts(sizes)) / sizes
        square = energy * self.step**2  # of the step wanted: 4**octave <= square < 4**(octave + 1)
        octave = (np.frexp(square)[1] - 1) // 2
        place = np.ldexp(square, -2 * octave)
        index = 2 * octave + (place >= 1.5) + (place >= 3)
        largest = np.maximum.reduceat(np.abs(wide), starts(sizes))
        least = 2 * np.frexp(largest / _TOP)[1]  # no level is clipped
        return np.asarray(np.clip(np.maximum(index, least), *_INDICES), np.int16)

    def _encode(
        self, x: Vector, layout: Layout, seed: int, reference: Vector | None = None
    ) -> bytes:
        sizes = group_sizes(layout, self.scale, 0)
        indices = self._indices(x, sizes)
        steps = _steps(indices, sizes)
        codes, centre = _codes(x, steps), _centre(reference, steps)
        return indices.astype("<i2").tobytes() + _integers.encode(
            codes, layout, _BITS, centre=centre
        )

    def _decode(
        self, body: memoryview, layout: Layout, seed: int, reference: Vector | None = None
    ) -> Vector:
        sizes = group_sizes(layout, self.scale, 0)
        head, rest = body[: 2 * sizes.size], body[2 * sizes.size :]
        if len(head) < 2 * sizes.size:
            raise DecodeError(f"{len(body)} bytes cannot hold {sizes.size} steps")
        indices = np.frombuffer(head, "<i2")
        if indices.size and not _INDICES[0] <= indices.min() <= indices.max() <= _INDICES[1]:
            raise DecodeError("a step is out of range")
        centre = _TOP if reference is None else _centre(reference, _steps(indices, sizes))
        codes = _integers.decode(rest, layout, _BITS, centre=centre)
        if (codes > 2 * _TOP).any():
            raise DecodeError("a level is out of range")
        y = np.empty(layout.size, np.float32)
        for part, steps in pieces(_step(indices), sizes):
            y[part] = to_float32((codes[part] - float(_TOP)) * steps)
        return y

    def _encode_beside(self, x: Vector, reference: Vector, layout: Layout, seed: int) -> bytes:
        return self._encode(x, layout, seed, reference)

    def _decode_beside(
        self, body: memoryview, reference: Vector, layout: Layout, seed: int
    ) -> Vector:
        return self._decode(body, layout, seed, reference)


def _step(indices: NDArray[np.int16]) -> NDArray[np.float64]:
    mantissa = np.where(indices % 2, 1.5, 1.0)
    return np.ldexp(mantissa, indices.astype(np.int32) // 2)


def _steps(indices: NDArray[np.int16], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.repeat(_step(indices), sizes)


def _codes(x: Vector, steps: NDArray[np.float64]) -> NDArray[np.int32]:
    return (np.clip(np.rint(x / steps), -_TOP, _TOP) + _TOP).astype(np.int32)


def _centre(reference: Vector | None, steps: NDArray[np.float64]) -> NDArray[np.int32] | int:
    return _TOP if reference is None else _codes(reference, steps)
