"""Weighted mean, McMahan et al. 2017, https://arxiv.org/abs/1602.05629: the rule of FedAvg."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import wire
from fedq.aggregators import _exact
from fedq.aggregators.base import Stream, Weights, check_update
from fedq.aggregators.blockwise import Blockwise, Products
from fedq.errors import ConfigError, DecodeError
from fedq.jit import jit
from fedq.layout import Vector
from fedq.registry import register

_SUM_BYTES = 16
_BLOCK = 4096  # float64 sums that stay in the first-level cache


@register("aggregator", "mean")
class Mean(Blockwise):
    """Average the updates by weight, ``sum_i w_i u_i / sum_i w_i`` (McMahan et al. 2017).

    Sums run in float64, in the order of the rows; :meth:`stream` sums exactly, in any order.

    Example:
      >>> Mean()(np.array([[1.0, 2.0], [4.0, 8.0]], np.float32), np.array([1, 2]))
      array([3., 6.], dtype=float32)

    Reference:
      McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
      data", Algorithm 1.
    """

    keeps_range: ClassVar[bool] = True

    def breakdown(self, n: int) -> int:
        """0: one update moves the mean anywhere."""
        return 0

    def _mixing(self, products: Products, weights: Weights) -> NDArray[np.float64]:
        shares = weights / weights.max()
        return np.asarray(shares / shares.sum())[None]

    def _aggregate(self, updates: NDArray[np.float32], weights: Weights) -> Vector:
        out = np.empty(updates.shape[1], np.float32)
        _weighted_mean(updates, weights / weights.max(), out)  # no overflow, whatever the unit
        return out

    def stream(self, d: int, capacity: int, reference: Vector | None = None) -> MeanStream:
        """Return an empty exact mean of (d,) updates; memory does not grow with the capacity."""
        return MeanStream(d)


class MeanStream(Stream):
    """A weighted mean of one update at a time, exactly independent of their order.

    Sums are integers: 16 bytes per coordinate, however many updates come. An update counts exactly
    where it is zero or ``|x| >= 2**-38``, and to within ``2**-62`` (absolute) elsewhere; a weight
    is rounded to a multiple of ``2**-10``. The result is the float32 next to the mean of those
    values (to within a relative ``2**-50`` before rounding), and any order of :meth:`add` and
    :meth:`merge` gives the same bits on every machine. Not safe for use by several threads at once:
    give each its own stream and merge them.

    Example:
      >>> stream = MeanStream(2)
      >>> stream.add(np.array([1.0, 2.0], np.float32), 1)
      >>> stream.add(np.array([4.0, 8.0], np.float32), 2)
      >>> stream.result(), stream.count, stream.weight
      (array([3., 6.], dtype=float32), 2, 3.0)
    """

    MAX_COUNT: ClassVar[int] = 1 << 20
    WEIGHT_UNITS: ClassVar[int] = 1 << 10
    MAX_WEIGHT: ClassVar[int] = 1 << 20

    def __init__(self, d: int) -> None:
        if d < 0:
            raise ConfigError(f"a stream needs d >= 0, not {d}")
        self._high = np.zeros(d, np.int64)
        self._low = np.zeros(d, np.uint64)
        self._units = 0
        self.count = 0

    @property
    def units(self) -> int:
        """The sum of the weights, in multiples of ``2**-10``."""
        return self._units

    @property
    def weight(self) -> float:
        """The sum of the weights as they were rounded."""
        return self._units / self.WEIGHT_UNITS

    def add(self, update: Vector, weight: float, slot: int = 0) -> None:
        """Add one update; on an error nothing has changed.

        Args:
          update: (d,) float32 with ``|x| < 2**15``.
          weight: In [0, 2**20); what rounds to a multiple of ``2**-10`` loses nothing.
          slot: Ignored: the order of updates does not matter.

        Raises:
          ConfigError: If the update has another shape, dtype or range (or holds NaN), if the weight
            is out of range or too small to count, or after ``2**20`` updates.
        """
        check_update(update, self._high.size)
        units = self._weight_units(weight)
        self._check_count(1)
        bits = np.ascontiguousarray(update).view(np.int32)
        if not _exact.in_range(bits):
            raise ConfigError(
                f"updates of a mean must be finite and below 2**{_exact.RANGE_BITS} in magnitude; "
                "clip or drop this one"
            )
        _exact.add(self._high, self._low, bits, units)
        self._units += units
        self.count += 1

    def merge(self, other: MeanStream) -> None:
        """Add everything that another stream of the same d has seen."""
        if other._high.shape != self._high.shape:
            raise ConfigError(f"cannot merge d={other._high.size} into d={self._high.size}")
        self._check_count(other.count)
        _exact.merge(self._high, self._low, other._high, other._low)
        self._units += other._units
        self.count += other.count

    def add_mean(self, mean: Vector, units: int, count: int) -> None:
        """Add the mean of ``count`` updates that weighed ``units`` in all, as one update.

        Args:
          mean: As an update of :meth:`add`.
          units: A sum of weights, in multiples of ``2**-10``.
          count: Updates, at least 1.

        Raises:
          ConfigError: As :meth:`add` does, or if ``count`` updates cannot weigh so much.
        """
        check_update(mean, self._high.size)
        self._check_count(count)
        if not 0 < units < count * _MAX_UNITS:
            raise ConfigError(f"{count} updates cannot weigh {units} units")
        bits = np.ascontiguousarray(mean).view(np.int32)
        if not _exact.in_range(bits):
            raise ConfigError(f"a mean of updates must be below 2**{_exact.RANGE_BITS}")
        left = units
        while left:  # of integers, so that the pieces are the whole
            piece = min(left, _MAX_UNITS - 1)
            _exact.add(self._high, self._low, bits, piece)
            left -= piece
        self._units += units
        self.count += count

    def dump(self) -> bytes:
        """Return all that was added, exactly: for :meth:`load` in another process.

        ``varint count | varint units | first u8 | end u8 | d (end - first) bytes``: of each sum,
        in two's complement and little-endian, the bytes from ``first`` on and below ``end``; the
        others follow, as zeros and signs.
        """
        words = np.stack([self._low, self._high.view(np.uint64)], axis=1).astype("<u8", copy=False)
        columns = words.view(np.uint8).reshape(-1, _SUM_BYTES)
        used = columns.any(axis=0)
        first, end = (int(used.argmax()) if used.any() else 0), _SUM_BYTES
        while end > first + 1 and (columns[:, end - 1] == _signs(columns[:, end - 2])).all():
            end -= 1
        head = wire.varint(self.count) + wire.varint(self._units) + bytes([first, end])
        return head + columns[:, first:end].tobytes()

    @classmethod
    def load(cls, data: bytes | memoryview, d: int) -> MeanStream:
        """Read what :meth:`dump` wrote for (d,) updates.

        Raises:
          DecodeError: If it is not of this size, or more than so many updates can sum to.
        """
        reader = wire.Reader(data)
        count, units, first, end = reader.varint(), reader.varint(), reader.byte(), reader.byte()
        if count > cls.MAX_COUNT or units > count * _MAX_UNITS:
            raise DecodeError(f"{count} updates that weigh {units} units")
        if not first < end <= _SUM_BYTES:
            raise DecodeError(f"sums of the bytes {first} to {end}")
        body = np.frombuffer(reader.take(d * (end - first)), np.uint8).reshape(d, end - first)
        reader.end()
        columns = np.zeros((d, _SUM_BYTES), np.uint8)
        columns[:, first:end] = body
        columns[:, end:] = _signs(body[:, -1])[:, None]
        words = columns.view("<u8").astype(np.uint64, copy=False)
        stream = cls(d)
        stream._low[:], stream._high[:] = words[:, 0], words[:, 1].view(np.int64)
        if (np.abs(stream._high >> 1) > count << 41).any():
            raise DecodeError(f"sums beyond what {count} updates come to")
        stream._units, stream.count = units, count
        return stream

    def result(self) -> Vector:
        """Return the mean so far, (d,) float32; more updates may follow.

        Raises:
          ConfigError: While the total weight is zero.
        """
        if not self._units:
            raise ConfigError("a mean needs at least one update with a positive weight")
        out = np.empty(self._high.size, np.float32)
        _exact.divide(self._high, self._low, self._units, out)
        return out

    def _weight_units(self, weight: float) -> int:
        if not (math.isfinite(weight) and 0 <= weight < self.MAX_WEIGHT):
            raise ConfigError(f"a weight must lie in [0, {self.MAX_WEIGHT}), not {weight}")
        units = round(float(weight) * self.WEIGHT_UNITS)
        if weight > 0 and not units:
            raise ConfigError(f"weight {weight} is too small to count; scale all weights up")
        return min(units, self.MAX_WEIGHT * self.WEIGHT_UNITS - 1)

    def _check_count(self, more: int) -> None:
        if self.count + more > self.MAX_COUNT:
            raise ConfigError(f"a stream holds at most {self.MAX_COUNT} updates")


_MAX_UNITS = MeanStream.MAX_WEIGHT * MeanStream.WEIGHT_UNITS


def _signs(top: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the byte that extends a number whose highest one is ``top``."""
    return np.where(top & 0x80, np.uint8(0xFF), np.uint8(0))


@jit
def _weighted_mean(
    updates: NDArray[np.float32], weights: NDArray[np.float64], out: NDArray[np.float32]
) -> None:
    # A loop, not BLAS: the order of additions, hence the result, is the same on every machine.
    n, d = updates.shape
    total = 0.0
    for i in range(n):
        total += weights[i]
    sums = np.empty(min(d, _BLOCK), np.float64)
    for start in range(0, d, _BLOCK):
        size = min(_BLOCK, d - start)
        sums[:size] = 0.0
        for i in range(n):
            w = weights[i]
            for j in range(size):
                sums[j] += w * updates[i, start + j]
        for j in range(size):
            out[start + j] = sums[j] / total
