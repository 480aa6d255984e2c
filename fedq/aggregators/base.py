"""What every aggregator is: a map from client updates and weights to one vector."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Vector

Weights = NDArray[np.float64]

#: Float32 values that a coordinate-wise rule holds at once beside its input, 16 MiB.
BLOCK_VALUES = 1 << 22


class Stream(abc.ABC):
    """Updates of one round that come one at a time, in any order."""

    @abc.abstractmethod
    def add(self, update: Vector, weight: float, slot: int) -> None:
        """Add one update; on an error nothing has changed.

        Args:
          update: (d,) float32, finite; copied.
          weight: Finite and >= 0.
          slot: The sender's place in the cohort, below the capacity; decides the order of the rows,
            so that the order of arrival decides nothing.

        Raises:
          ConfigError: If shape, dtype or a value is another, the slot is taken or the stream full.
        """

    @abc.abstractmethod
    def result(self) -> Vector:
        """Return the aggregate, (d,) float32; call it once, after the last update.

        Raises:
          ConfigError: If there are no updates, or too few for the rule.
        """


class Aggregator(abc.ABC):
    """A map from n client updates to one.

    Subclasses are registered frozen dataclasses that implement :meth:`_aggregate`; this class
    checks the input once. Inputs are never written to.
    """

    group: ClassVar[str] = "aggregator"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abc.abstractmethod
    def breakdown(self, n: int) -> int:
        """Return how many of ``n`` updates may be arbitrary for the honest range to hold.

        With at most that many replaced, every coordinate of the result lies between the smallest
        and the largest honest value of that coordinate.
        """

    @abc.abstractmethod
    def _aggregate(self, updates: NDArray[np.float32], weights: Weights) -> Vector:
        """Aggregate finite C-contiguous (n, d) updates, n >= 1; must not write to them."""

    def __call__(self, updates: NDArray[np.float32], weights: NDArray[Any]) -> Vector:
        """Aggregate updates.

        Args:
          updates: (n, d) finite values, n >= 1; converted to float32.
          weights: (n,) finite values >= 0 with a positive sum, e.g. examples per client.

        Returns:
          (d,) float32.

        Raises:
          ConfigError: If shapes or values are others.
        """
        try:
            with np.errstate(over="ignore"):  # too large for float32: refused below as infinite
                updates = np.ascontiguousarray(updates, dtype=np.float32)
                weights = np.asarray(weights, dtype=np.float64)
        except (TypeError, ValueError):
            raise ConfigError("updates and weights must be numeric arrays") from None
        if updates.ndim != 2 or len(updates) < 1:
            raise ConfigError(f"updates must have shape (n, d) with n >= 1, not {updates.shape}")
        if weights.shape != (len(updates),):
            raise ConfigError(f"weights must have shape ({len(updates)},), not {weights.shape}")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and (weights > 0).any()):
            raise ConfigError("weights must be finite and >= 0, with a positive sum")
        for i, update in enumerate(updates):  # row by row: no (n, d) temporary
            if not np.isfinite(update).all():
                raise ConfigError(f"update {i} holds NaN or infinity; drop it before aggregation")
        return self._aggregate(updates, weights)

    def stream(self, d: int, capacity: int) -> Stream:
        """Return an empty stream of (d,) updates; this one holds them all, a sum need not.

        Args:
          d: Coordinates of each update.
          capacity: Updates at most.

        Raises:
          ConfigError: If d or the capacity is negative, or memory does not suffice.

        Example:
          >>> from fedq.registry import build
          >>> stream = build("aggregator", "median").stream(2, capacity=3)
          >>> stream.add(np.array([4.0, 8.0], np.float32), 1, slot=2)
          >>> stream.add(np.array([1.0, 2.0], np.float32), 1, slot=0)
          >>> stream.result()
          array([2.5, 5. ], dtype=float32)
        """
        return Rows(self, d, capacity)


class Rows(Stream):
    """The updates of a rule that compares them, in the order of their slots.

    4 d bytes per update, in one block of memory that becomes real row by row; ``result`` closes the
    gaps of absent slots in place, so that no second block is needed.
    """

    def __init__(self, aggregator: Aggregator, d: int, capacity: int) -> None:
        if d < 0 or capacity < 0:
            raise ConfigError(f"a stream needs d >= 0 and capacity >= 0, not {d} and {capacity}")
        try:
            self._rows = np.empty((capacity, d), np.float32)
        except (MemoryError, ValueError):
            raise ConfigError(
                f"aggregator={aggregator.name} holds all updates, {4 * capacity * d / 2**30:.0f} "
                "GiB; lower clients_per_round or choose aggregator=mean"
            ) from None
        self._aggregator = aggregator
        self._weights = np.zeros(capacity, np.float64)
        self._present = np.zeros(capacity, np.bool_)
        self._open = True

    def add(self, update: Vector, weight: float, slot: int) -> None:
        """Add one update; see :meth:`Stream.add`."""
        if not self._open:
            raise ConfigError("the stream has ended; start another")
        check_update(update, self._rows.shape[1])
        if not 0 <= slot < len(self._rows) or self._present[slot]:
            raise ConfigError(f"slot {slot} is taken, or not one of {len(self._rows)}")
        if not np.isfinite(update).all():
            raise ConfigError("the update holds NaN or infinity; drop it")
        if not 0 <= weight < np.inf:
            raise ConfigError(f"a weight must be finite and >= 0, not {weight}")
        self._rows[slot], self._weights[slot], self._present[slot] = update, weight, True

    def result(self) -> Vector:
        """Apply the rule; see :meth:`Stream.result`."""
        if not self._open:
            raise ConfigError("the stream has ended; start another")
        self._open = False
        slots = np.flatnonzero(self._present)
        for row, slot in enumerate(slots):
            if row != slot:
                self._rows[row] = self._rows[slot]
        rows, self._rows = self._rows[: slots.size], self._rows[:0]
        return self._aggregator(rows, self._weights[slots])


def check_update(update: Vector, d: int) -> None:
    """Raise a ConfigError unless the update is (d,) float32."""
    if update.dtype != np.float32 or update.shape != (d,):
        raise ConfigError(
            f"expected float32 of shape ({d},), not {update.dtype} of shape {update.shape}"
        )


def sorted_blocks(updates: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield the columns of (n, d) updates in blocks, each (columns, n) with its rows sorted.

    Sorting along the contiguous axis of a transposed copy is several times faster than down the
    columns; a block holds at most ``BLOCK_VALUES`` values, or one column.
    """
    n, d = updates.shape
    step = max(1, BLOCK_VALUES // n)
    for start in range(0, d, step):
        columns = slice(start, min(start + step, d))
        block = np.array(updates[:, columns].T, order="C", copy=True)
        block.sort(axis=1)
        yield columns, block
