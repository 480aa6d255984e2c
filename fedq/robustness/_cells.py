"""What a decoded update says of the one before: between which bounds each coordinate lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq import wire
from fedq.codecs._groups import group_sizes, read_floats, read_scales
from fedq.codecs.base import Codec, decode_frame
from fedq.codecs.identity import Identity
from fedq.codecs.sign import Sign
from fedq.codecs.top_k import TopK
from fedq.codecs.uniform import Uniform, _Grid
from fedq.layout import Layout, Vector

#: Reach of an estimated cell in root mean square errors.
_REACH = 2.0


@dataclass(frozen=True)
class Cells:
    """The set of updates that a payload may stand for, as far as its codec tells.

    Attributes:
      values: (d,) float32, as decoded.
      low: (d,) float32; minus infinity where only a sign is known.
      high: (d,) float32; infinity likewise.
      exact: Whether the update surely lies within; else the bounds are of simulated errors.
      flat: Whether all updates within are alike likely; else those near what was decoded are
        likelier.
    """

    values: Vector
    low: Vector
    high: Vector
    exact: bool = True
    flat: bool = True

    def scaled(self, factor: float) -> Cells:
        """Return the cells of the update times a factor, which may be negative."""
        ends = (np.float32(factor) * self.low, np.float32(factor) * self.high)
        low, high = ends if factor > 0 else ends[::-1]
        values = np.float32(factor) * self.values
        return replace(self, values=values, low=low, high=high)


def cells(payload: bytes, layout: Layout, surrogate: Vector) -> Cells:
    """Return what a payload says of each coordinate of the update.

    Args:
      payload: Of any codec.
      layout: Names and shapes of the update.
      surrogate: (d,) float32, an update that the attacker makes itself, to learn the errors of a
        codec whose cells have no simple form.

    Example:
      >>> import fedq
      >>> layout, x = Layout.flat(3), np.array([1.0, -0.4, 0.1], np.float32)
      >>> payload = fedq.build("codec", "uniform", bits=4).encode(x, layout)
      >>> found = cells(payload, layout, x)
      >>> bool(((found.low <= x) & (x <= found.high)).all()), found.exact
      (True, True)
    """
    frame = wire.open_frame(payload, layout)
    return _cells(frame.codec, frame, layout, decode_frame(frame, layout), surrogate)


@singledispatch
def _cells(
    codec: Codec, frame: wire.Frame, layout: Layout, values: Vector, surrogate: Vector
) -> Cells:
    """Estimate the errors of each tensor from those of an update of the attacker's own."""
    error = codec.decode(codec.encode(surrogate, layout, frame.seed), layout) - surrogate
    reach = np.empty(layout.size, np.float32)
    for tensor in layout:
        own = float(np.linalg.norm(surrogate[tensor.slice]))
        scale = float(np.linalg.norm(values[tensor.slice])) / own if own else 1.0
        rms = float(np.sqrt(np.square(error[tensor.slice]).mean())) if tensor.size else 0.0
        reach[tensor.slice] = _REACH * scale * rms
    return Cells(values, values - reach, values + reach, exact=False, flat=False)


@_cells.register
def _(
    codec: Identity, frame: wire.Frame, layout: Layout, values: Vector, surrogate: Vector
) -> Cells:
    return Cells(values, values, values)


@_cells.register
def _(codec: Sign, frame: wire.Frame, layout: Layout, values: Vector, surrogate: Vector) -> Cells:
    return _signs(values)


@_cells.register
def _(
    codec: Uniform, frame: wire.Frame, layout: Layout, values: Vector, surrogate: Vector
) -> Cells:
    if codec.bits == 1 and codec.symmetric and codec.rounding == "nearest":
        return _signs(values)
    sizes = group_sizes(layout, codec.scale, codec.bucket)
    if codec.symmetric:
        high, _ = read_scales(frame.body, sizes.size)
        low = -high
    else:
        low, rest = read_floats(frame.body, sizes.size)
        high, _ = read_floats(rest, sizes.size)
    step = _Grid(codec, low, high, sizes, frame.seed).levels[2]
    reach: NDArray[Any] = np.repeat(step * (1.0 if codec.rounding == "stochastic" else 0.5), sizes)
    # A hair wider, for the rounding of float32.
    reach = np.asarray(reach * (1 + 1e-4) + 1e-6 * np.abs(values), np.float32)
    low, high = values - reach, values + reach
    return Cells(values, low, high, flat=codec.rounding != "stochastic")


@_cells.register
def _(codec: TopK, frame: wire.Frame, layout: Layout, values: Vector, surrogate: Vector) -> Cells:
    """What was dropped is no larger than the least that was kept."""
    kept = values != 0
    least = float(np.abs(values[kept]).min(initial=np.inf)) if kept.any() else 0.0
    largest = np.sort(np.abs(surrogate))[-max(int(kept.sum()), 1) :]
    inner = Layout.flat(largest.size)
    error = codec.inner.decode(codec.inner.encode(largest, inner, frame.seed), inner) - largest
    size = float(np.linalg.norm(largest))
    scale = float(np.linalg.norm(values)) / size if size else 1.0
    rms = scale * float(np.sqrt(np.square(error).mean()))
    reach = np.where(kept, _REACH * rms, least + _REACH * rms).astype(np.float32)
    return Cells(values, values - reach, values + reach, exact=False, flat=False)


def _signs(values: Vector) -> Cells:
    """Return half lines; where a whole tensor is zero, so was the update."""
    limit = np.where(values == 0, np.float32(0), np.float32(np.inf))
    low: NDArray[np.float32] = np.where(values > 0, np.float32(0), -limit)
    high: NDArray[np.float32] = np.where(values < 0, np.float32(0), limit)
    return Cells(values, low.astype(np.float32), high.astype(np.float32))
