"""What a reference tells the range coder: which coordinates may be large, and of which sign."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.codecs._range import HINT_POSITIVE, HINT_SIZES
from fedq.jit import jit
from fedq.layout import Layout, Vector

Hints = NDArray[np.uint8]


def hints(reference: Vector, layout: Layout) -> Hints:
    """Return the coder's hints, (d,): octaves about each tensor's root mean square, and signs.

    >>> reference = np.array([0, 1, -1, 2, -4], np.float32)
    >>> hints(reference, Layout.flat(5)) % HINT_SIZES
    array([0, 3, 3, 4, 5], dtype=uint8)
    """
    out = np.empty(layout.size, np.uint8)
    for tensor in layout:
        _write(reference[tensor.slice], out[tensor.slice])
    return out


@jit
def _write(reference, out):  # type: ignore[no-untyped-def]
    """Write a tensor's hints. The sum runs in order, so that both ends find the same mean."""
    total = 0.0
    for n in range(reference.size):
        value = np.float64(reference[n])
        total += value * value
    for n in range(reference.size):
        value = np.float64(reference[n])
        bound = total / reference.size / 256.0
        octave = 0
        while octave < HINT_SIZES - 1 and value * value > bound:
            octave += 1
            bound *= 4.0
        out[n] = octave + (HINT_POSITIVE if value > 0 else 0)
