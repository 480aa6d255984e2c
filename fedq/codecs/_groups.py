"""Groups of coordinates that share a scale, and their scales on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedq import random
from fedq.errors import DecodeError
from fedq.layout import Layout, Vector

#: Who shares a scale: all coordinates, a tensor, an output channel, or ``bucket`` neighbours.
Sharing = Literal["model", "tensor", "channel", "bucket"]

Wide = NDArray[np.float64]

_CUT = 1 << 14


def group_sizes(layout: Layout, sharing: Sharing, bucket: int) -> NDArray[np.int64]:
    """Return the sizes of the non-empty groups, in order; they add up to ``layout.size``.

    >>> group_sizes(Layout.of({"w": np.ones((2, 3)), "b": np.ones(2)}), "channel", 0).tolist()
    [3, 3, 2]
    """
    if sharing == "bucket":
        full, rest = divmod(layout.size, bucket)
        sizes = np.append(np.full(full, bucket), rest)
    elif sharing == "channel":
        rows = [tensor.rows for tensor in layout]
        sizes = np.repeat([tensor.size // max(tensor.rows, 1) for tensor in layout], rows)
    elif sharing == "tensor":
        sizes = np.array([tensor.size for tensor in layout])
    else:
        sizes = np.array([layout.size])
    return sizes[sizes > 0].astype(np.int64)


def starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each group starts, for ``ufunc.reduceat``."""
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)


def largest(x: Vector, sizes: NDArray[np.int64]) -> Vector:
    """Return the largest magnitude of each group, (groups,) float32."""
    if not sizes.size:
        return np.zeros(0, np.float32)
    return np.asarray(np.maximum.reduceat(np.abs(x), starts(sizes)), np.float32)


def means(x: Vector, sizes: NDArray[np.int64]) -> Vector:
    """Return the mean magnitude of each group, (groups,) float32."""
    if not sizes.size:
        return np.zeros(0, np.float32)
    total = np.add.reduceat(np.abs(x), starts(sizes), dtype=np.float64)
    return np.asarray(total / sizes, np.float32)


def fractions(seed: int, count: int, purpose: str) -> Wide:
    """Return (count,) float64 uniform in (0, 1), multiples of 2**-33: the same on both ends."""
    return np.asarray((random.words(seed, count, purpose) + 0.5) * 2.0**-32, np.float64)


def spread(values: NDArray[np.float32], sizes: NDArray[np.int64]) -> Wide:
    """Return one float64 per coordinate, (d,), from one per group."""
    return np.repeat(values.astype(np.float64), sizes)


def cuts(count: int) -> Iterator[slice]:
    """Yield slices of a vector that are small enough for some float64 copies of each."""
    for start in range(0, count, _CUT):
        yield slice(start, min(start + _CUT, count))


def pieces(
    values: NDArray[np.float32] | Wide, sizes: NDArray[np.int64]
) -> Iterator[tuple[slice, Wide]]:
    """Yield what :func:`spread` returns, in slices, which keeps a decoder's memory small.

    >>> [(part.start, s.tolist()) for part, s in pieces(np.ones(2, "f4"), np.array([1, 2]))]
    [(0, [1.0, 1.0, 1.0])]
    """
    ends = np.cumsum(sizes)
    for part in cuts(int(sizes.sum())):
        first, last = np.searchsorted(ends, [part.start, part.stop - 1], side="right")
        inside = ends[first : last + 1]
        low = np.maximum(inside - sizes[first : last + 1], part.start)
        counts = np.minimum(inside, part.stop) - low
        yield part, np.repeat(values[first : last + 1].astype(np.float64), counts)


def scaled(values: Vector, factor: float) -> Vector:
    """Return float32 values times a factor, saturated; the values' memory is used again."""
    for part in cuts(values.size):
        values[part] = to_float32(values[part].astype(np.float64) * factor)
    return values


def floats_bytes(values: NDArray[np.float32]) -> bytes:
    """Serialise little-endian float32."""
    return values.astype("<f4").tobytes()


def read_floats(body: memoryview, count: int) -> tuple[NDArray[np.float32], memoryview]:
    """Return ``count`` finite little-endian float32 and the rest of the body.

    Raises:
      DecodeError: If the body is too short, or one is NaN or infinite.
    """
    if len(body) < 4 * count:
        raise DecodeError(f"{len(body)} bytes cannot hold {count} scales")
    values = np.frombuffer(body[: 4 * count], "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise DecodeError("a scale is NaN or infinite")
    return values, body[4 * count :]


def read_scales(body: memoryview, count: int) -> tuple[NDArray[np.float32], memoryview]:
    """Return ``count`` scales, finite and not negative, and the rest of the body."""
    values, rest = read_floats(body, count)
    if np.signbit(values).any():
        raise DecodeError("a scale is negative")
    return values, rest


def to_float32(y: Wide) -> Vector:
    """Round to float32; what exceeds its range saturates instead of becoming infinite."""
    top = float(np.finfo(np.float32).max)
    return np.clip(y, -top, top).astype(np.float32)
