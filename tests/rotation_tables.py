"""Where ``fedq/codecs/_levels.py`` comes from: ``python -m tests.rotation_tables`` prints it.

The tables are constants because decoders must agree to the bit, and ``exp`` and ``erf`` do not.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Levels are integers in units of 1 / UNIT.
UNIT = 1 << 16
#: QUIC-FL: beyond it lies 1/512 of a normal variable (section 5.1 of the paper).
THRESHOLD = NormalDist().inv_cdf(1 - 1 / 1024)
#: QUIC-FL: bits of shared randomness for 1, 2, 3 and 4 bits per coordinate, as the authors chose.
SHARED_BITS = (6, 5, 4, 4)


def _cdf(x: Array) -> Array:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def _density(x: Array) -> Array:
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def lloyd_max(bits: int) -> Array:
    """Return the ``2**bits`` levels of least squared error for N(0, 1), ascending (Max 1960).

    Newton's iteration on "every level is the mean of its cell", whose Jacobian has three diagonals.
    """
    count = 1 << bits
    spread = NormalDist(0, math.sqrt(3))  # the density of levels goes as the cube root: variance 3
    levels = np.array([spread.inv_cdf((i + 0.5) / count) for i in range(count)])
    for _ in range(60):
        middle = (levels[1:] + levels[:-1]) / 2
        density, mass = _density(middle), np.diff(_cdf(middle), prepend=0.0, append=1.0)
        first = -np.diff(density, prepend=0.0, append=0.0)
        gap = first / mass - levels
        # d mean / d lower and upper border, each of which moves half as much as a level.
        lower = np.append(0.0, density * ((first / mass)[1:] - middle) / mass[1:]) / 2
        upper = np.append(density * (middle - (first / mass)[:-1]) / mass[:-1], 0.0) / 2
        jacobian = np.diag(lower + upper - 1) + np.diag(lower[1:], -1) + np.diag(upper[:-1], 1)
        levels -= np.linalg.solve(jacobian, gap)
    return (levels - levels[::-1]) / 2


def _staircase(table: Array) -> tuple[Array, NDArray[np.int64], NDArray[np.int64], Array]:
    """Return midpoints in ascending order, whose they are, and states and levels between them."""
    shared, count = table.shape
    middle = (table[:, 1:] + table[:, :-1]) / 2
    order = np.argsort(middle, axis=None, kind="stable")
    owner = order // (count - 1)
    state = np.zeros((order.size + 1, shared), np.int64)
    state[np.arange(1, order.size + 1), owner] = 1
    state = np.cumsum(state, axis=0)
    return middle.ravel()[order], owner, state, np.take_along_axis(table.T, state, 0)


def quic_fl_error(table: Array) -> float:
    """Return QUIC-FL's NMSE for N(0, 1): its levels are ``table``, (shared values, codes).

    The decoded value has mean z, so its variance is E[level**2] - z**2, and E[level**2] is linear
    in z between the steps of the staircase.
    """
    _, _, _, levels = _staircase(table)
    mean, square = levels.mean(axis=1), (levels**2).mean(axis=1)
    mass = np.diff(_cdf(mean))
    first = -np.diff(_density(mean))
    slope = np.diff(square) / np.diff(mean)
    second = mass.sum() - 2 * mean[-1] * _density(mean)[-1]
    return float((mass * (square[:-1] - slope * mean[:-1]) + slope * first).sum() - second)


def quic_fl(bits: int, shared_bits: int, iterations: int = 3000) -> Array:
    """Return QUIC-FL's levels for N(0, 1), (2**shared_bits, 2**bits), ascending both ways.

    The problem of section 4: choose levels R(h, c) and a rule that sends a code c for shared
    randomness h and value z, such that the mean over h of what is decoded is z for every z in
    +-THRESHOLD, with least expected squared error. The authors solve it for quantiles of z with a
    solver. Here z is continuous, by duality: with a multiplier for the mean, the best code of each
    h is the level nearest to one common target t(z); the mean of those levels is a staircase in t,
    and z between two of its steps mixes them. Levels are then optimal where each is the mean of
    the targets that choose it (Lloyd's condition), but for the last ones, which are pushed out so
    that the mean reaches the threshold.
    """
    shared, count = 1 << shared_bits, 1 << bits
    quantiles = [NormalDist().inv_cdf((i + 0.5) / (shared * count)) for i in range(shared * count)]
    table = np.array(quantiles).reshape(count, shared).T * (1 + 0.5 / count)
    table[:, [0, -1]] *= THRESHOLD / table[:, -1].mean()
    rows = np.arange(shared)
    for _ in range(iterations):
        target, owner, state, levels = _staircase(table)
        mean = levels.mean(axis=1)
        mass = np.diff(_cdf(mean))
        risen = (-np.diff(_density(mean)) - mass * mean[:-1]) / np.diff(mean)
        weight, total = np.zeros((2, shared, count))
        for j, who in enumerate(owner):
            for place, part in (
                ((rows, state[j]), mass[j]),
                ((who, state[j, who]), -risen[j]),
                ((who, state[j + 1, who]), risen[j]),
            ):
                weight[place] += part
                total[place] += part * target[j]
        better = total / weight
        push = (THRESHOLD - better[:, -1].mean()) / (1 / weight[:, -1]).mean()
        better[:, -1] += push / weight[:, -1]
        better[:, 0] -= push / weight[:, 0]
        table = (table + better) / 2
        table = (table - table[::-1, ::-1]) / 2
    return table


def _rows(values: Array) -> str:
    numbers = [str(v) for v in np.rint(values * UNIT).astype(int).ravel()]
    text, line = "", "       "
    for number in numbers:
        if len(line) + len(number) + 2 > 100:
            text, line = text + line + "\n", "       "
        line += f" {number},"
    return text + line + "\n"


def main() -> None:
    """Print the module."""
    print('"""Levels for a standard normal variable; printed by ``tests/rotation_tables.py``."""\n')
    print("#: Levels are integers in units of 1 / UNIT.\nUNIT = 1 << 16\n")
    print("#: Lloyd-Max: the positive levels for 1 to 8 bits (Max 1960).")
    print("LLOYD_MAX = (")
    for bits in range(1, 9):
        print(f"    (\n{_rows(lloyd_max(bits)[1 << bits - 1 :])}    ),")
    print(")\n")
    print("#: QUIC-FL: bits of shared randomness for 1 to 4 bits.")
    print(f"SHARED_BITS = {SHARED_BITS}\n")
    print("#: QUIC-FL: for 1 to 4 bits, the upper half of the codes, each for all shared values.")
    print("QUIC_FL = (")
    for bits, shared in enumerate(SHARED_BITS, start=1):
        table = quic_fl(bits, shared)
        print(f"    (\n{_rows(table.T[1 << bits - 1 :])}    ),")
    print(")")


if __name__ == "__main__":
    main()
