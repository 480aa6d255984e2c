"""Kernels of rate-distortion optimised trellis-coded quantization."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedq.codecs import _scales
from fedq.codecs._range import ODD_ABOVE
from fedq.codecs._trellis import _WINDOW, _predecessors, transitions
from fedq.jit import jit
from fedq.layout import Vector

_CLASSES = 12
_MAGNITUDES = 16  # told apart by the rates
_PASSES = 2
_SHARES = np.array([0.01, 0.03, 0.08, 0.16, 0.3, 0.5, 0.8, 1.3, 2.2, 4.0, 8.0], np.float32)


@cache
def places() -> NDArray[np.uint8]:
    """Return the coder's side information by parity of the state, (2, 256): the parity itself."""
    table = np.zeros((2, 256), np.uint8)
    table[1] = 1 + ODD_ABOVE
    return table


def quantize(
    y: Vector, tensors: Sequence[tuple[int, int]], weight: float, states: int
) -> NDArray[np.int32]:
    """Return what is coded for ``y``, in steps, (n,) int32: half the level, away from zero.

    The first estimate of what levels cost comes from a dead zone; each search improves it. Odd
    states have a zero where most coordinates are zero; elsewhere it would only weaken the code.
    """
    sizes = np.array([size for size, _ in tensors], np.int64)
    columns = np.array([width for _, width in tensors], np.int64)
    values = (np.sign(y) * np.floor(np.abs(y) / 2 + 0.35)).astype(np.int32)
    merged = int(np.count_nonzero(values) < 0.3 * y.size)
    parity = np.zeros(y.size, np.uint8)
    classes = np.zeros(y.size, np.uint8)
    levels = np.zeros(y.size, np.int32)
    window = min(_WINDOW, max(y.size, 1))
    decisions, chosen = np.empty(window, np.uint64), np.empty((window, 4), np.int32)
    for _ in range(_PASSES):
        _classify(values, sizes, columns, _SHARES, classes)
        rates = np.float32(weight) * _rates(values, classes, parity)
        _search(y, classes, rates, merged, _predecessors(states), decisions, chosen, levels)
        _to_values(levels, transitions(states), values, parity)
    return values


def _rates(
    values: NDArray[np.int32], classes: NDArray[np.uint8], parity: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Return bits by class, parity and magnitude, (_CLASSES, 2, _MAGNITUDES), signs included."""
    size = np.minimum(np.abs(values), _MAGNITUDES - 1)
    place = (classes.astype(np.int64) * 2 + parity) * _MAGNITUDES + size
    count = np.bincount(place, minlength=_CLASSES * 2 * _MAGNITUDES).astype(np.float64)
    count = count.reshape(_CLASSES, 2, _MAGNITUDES)
    if not parity.any():
        count[:, 1] = count[:, 0]
    count += 0.3 * 0.5 ** np.arange(_MAGNITUDES)
    bits = -np.log2(count / count.sum(2, keepdims=True))
    bits[:, :, 1:] += 1
    return np.asarray(bits, np.float32)


@cache
def law() -> _scales.Law:
    """Return a rough forecast of bits and error by half octave of sigma over step.

    Reverse water-filling, softened: what is small against the level of 0.3 step^2 costs no bits
    and is lost, what is large is known to within it.
    """
    power = np.square(_scales._half_octaves(np.arange(-_scales.HALF, _scales.HALF)))
    even = np.ones(power.size)
    level = power / 0.3
    bits = 0.25 * np.log2(1 + level**2)
    error = power / np.sqrt(1 + level**2)
    return _scales.Law(even.astype(np.int64) * _scales.WHOLE, even, bits, error)


@jit
def _classify(values, sizes, columns, shares, classes):  # type: ignore[no-untyped-def]
    """Write the class of each coordinate: how large its neighbours above and to the left are."""
    n = 0
    for t in range(sizes.size):
        width = columns[t]
        above = np.zeros(width, np.float32)
        left = np.float32(0)
        j = 0
        for _ in range(sizes[t]):
            mean = (above[j] + left) * np.float32(0.5)
            c = 0
            while c < shares.size and mean > shares[c]:
                c += 1
            classes[n] = c
            size = np.float32(min(abs(values[n]), 63))
            # What decays towards zero ends there: subnormal numbers are slow.
            up = above[j] + (size - above[j]) * np.float32(0.125)
            above[j] = up if up > np.float32(1e-9) else np.float32(0)
            left += (size - left) * np.float32(0.125)
            if left < np.float32(1e-9):
                left = np.float32(0)
            n += 1
            j += 1
            if j == width:
                j = 0


@jit
def _search(y, classes, rates, merged, came, decisions, chosen, levels):  # type: ignore[no-untyped-def]
    """Viterbi's search over levels of least error plus rate."""
    states = came.shape[0]
    cost = np.empty(states, np.float32)
    after = np.empty(states, np.float32)
    price = np.empty(4, np.float32)
    first = np.int64(0)
    for start in range(0, y.size, decisions.size):
        size = min(decisions.size, y.size - start)
        cost[:] = np.float32(1e30)
        cost[first] = np.float32(0)
        for i in range(size):
            value = y[start + i]
            table = rates[classes[start + i]]
            for residue in range(4):
                parity = residue & 1
                quarter = (value - np.float32(residue)) * np.float32(0.25)
                level = 4 * np.int32(np.floor(quarter + np.float32(0.5))) + np.int32(residue)
                best, kept = np.float32(1e30), np.int32(0)
                for option in range(3):  # the nearest, the next towards zero, and zero
                    candidate = np.int64(0)
                    if option < 2:
                        candidate = np.int64(level) - option * (4 if level > 0 else -4)
                    elif residue > merged:
                        continue
                    size_ = min((abs(candidate) + parity) >> 1, _MAGNITUDES - 1)
                    error = value - np.float32(candidate)
                    total = error * error + table[parity, size_]
                    if total < best:
                        best, kept = total, np.int32(candidate)
                price[residue], chosen[i, residue] = best, kept
            bits = np.uint64(0)
            for s in range(states):
                a = cost[came[s, 0]] + price[came[s, 1]]
                b = cost[came[s, 2]] + price[came[s, 3]]
                if b < a:
                    bits |= np.uint64(1) << np.uint64(s)
                    a = b
                after[s] = a
            cost, after = after, cost
            decisions[i] = bits
            if i & 255 == 255:
                cost -= cost.min()
        first = np.argmin(cost)
        state = first
        for i in range(size - 1, -1, -1):
            side = np.int64((decisions[i] >> np.uint64(state)) & np.uint64(1)) * 2
            levels[start + i] = chosen[i, came[state, side + 1]]
            state = came[state, side]


@jit
def _to_values(levels, trellis, values, parity):  # type: ignore[no-untyped-def]
    """Write the value of each level, and the parity of the state that it was chosen in."""
    state = np.int64(0)
    for n in range(levels.size):
        odd = state & 1
        level = np.int64(levels[n])
        branch = 0 if level == 0 else (level >> 1) & 1
        half = (abs(level) + odd) >> 1
        values[n] = half if level > 0 else -half if level < 0 else 0
        parity[n] = odd
        state = trellis[state, branch]


@jit
def restore(values, trellis, scale, out):  # type: ignore[no-untyped-def]
    """Write the decoded coordinates, ``level scale``."""
    state = np.int64(0)
    top = 3.4028234663852886e38
    for n in range(values.size):
        v = np.int64(values[n])
        odd = state & 1
        level = 2 * v - (odd if v > 0 else -odd if v < 0 else 0)
        state = trellis[state, (v + odd) & 1 if v > 0 else v & 1]
        out[n] = np.float32(min(max(np.float64(level) * scale, -top), top))
