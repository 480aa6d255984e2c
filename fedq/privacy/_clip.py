"""Bounds on Euclidean norms that hold to the last bit."""

from __future__ import annotations

import math

import numpy as np

from fedq.layout import Vector

#: What rounding a scaled vector to float32 may lengthen it by, with room to spare.
_MARGIN = 1 - 2.0**-20


def norm(x: Vector) -> float:
    """Return the Euclidean norm in float64: no overflow, no lost digits."""
    return math.sqrt(float(np.einsum("i,i->", x, x, dtype=np.float64, casting="safe")))


def clipped(x: Vector, bound: float) -> Vector:
    """Return (d,) float32 of norm at most ``bound``: ``x``, or ``x`` scaled down.

    >>> clipped(np.array([3, 4], np.float32), 10.0)
    array([3., 4.], dtype=float32)
    >>> 0.99999 < norm(clipped(np.array([3, 4], np.float32), 1.0)) <= 1
    True
    """
    length = norm(x)
    if length <= bound:
        return x
    scaled = x * np.float64(bound * _MARGIN / length)
    return scaled.astype(np.float32)
