"""What every aggregator is: a map from client updates and weights to one vector."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Vector

if TYPE_CHECKING:
    from fedq.aggregators.mean import MeanStream

Weights = NDArray[np.float64]

#: Float32 values that a coordinate-wise rule holds at once beside its input, 16 MiB.
BLOCK_VALUES = 1 << 22


class Aggregator(abc.ABC):
    """A map from n client updates to one.

    Subclasses are registered frozen dataclasses that implement :meth:`_aggregate`; this class
    checks the input once. Inputs are never written to.
    """

    group: ClassVar[str] = "aggregator"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Whether :meth:`stream` aggregates one update at a time, in memory independent of n.
    streaming: ClassVar[bool] = False

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

    def stream(self, d: int) -> MeanStream:
        """Return an empty accumulator of (d,) updates, if the rule has one.

        Raises:
          ConfigError: If the rule needs all updates at once.
        """
        raise ConfigError(
            f"aggregator={self.name} needs all updates at once; only aggregator=mean streams"
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
