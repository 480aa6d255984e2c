"""What every aggregator is: a map from client updates and weights to one vector."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Vector

Weights = NDArray[np.float64]


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

    Subclasses are registered frozen dataclasses that implement :meth:`_aggregate` (or
    :meth:`_aggregate_beside`); this class checks the input once. Inputs are never written to. Only
    ``mean`` and ``norm_bounded`` count weights: an attacker would claim large ones.
    """

    group: ClassVar[str] = "aggregator"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Whether up to the breakdown point each coordinate stays in the range of its honest values.
    keeps_range: ClassVar[bool] = False
    #: Whether ``rule(updates + c) = rule(updates) + c``, and ``rule(s updates) = s rule(updates)``.
    translates: ClassVar[bool] = True
    scales: ClassVar[bool] = True

    @abc.abstractmethod
    def breakdown(self, n: int) -> int:
        """Return how many of ``n`` updates may be arbitrary while the honest ones bound the result.

        The finite-sample breakdown point of Donoho and Huber 1983, times n.
        """

    def check(self, n: int) -> None:  # noqa: B027 - most rules take any number
        """Refuse ``n`` updates if they are too few for the rule's options.

        Raises:
          ConfigError: With the rule's condition.
        """

    @property
    def trusted_examples(self) -> int:
        """Training examples of the server's own that this rule needs; 0 is none.

        The server trains on them in every round as a client would: the reference of
        :meth:`__call__`.
        """
        return 0

    @property
    def for_state(self) -> Aggregator:
        """The rule for what is averaged but not trained (quantizer ranges, batch statistics)."""
        return self

    def _aggregate(self, updates: NDArray[np.float32], weights: Weights) -> Vector:
        """Aggregate finite C-contiguous (n, d) updates, n >= 1; must not write to them."""
        raise ConfigError(f"aggregator={self.name} needs the server's own update as reference")

    def _aggregate_beside(
        self, updates: NDArray[np.float32], weights: Weights, reference: Vector
    ) -> Vector:
        """Aggregate beside a trusted update; only asked of rules with ``trusted_examples``."""
        raise NotImplementedError

    def __call__(
        self,
        updates: NDArray[np.float32],
        weights: NDArray[Any],
        reference: Vector | None = None,
    ) -> Vector:
        """Aggregate updates.

        Args:
          updates: (n, d) finite values, n >= 1; converted to float32.
          weights: (n,) finite values >= 0 with a positive sum, e.g. examples per client.
          reference: (d,) finite float32, an update of the server's own; for rules with
            ``trusted_examples``, ignored by the others.

        Returns:
          (d,) float32.

        Raises:
          ConfigError: If shapes or values are others, or there are too few updates for the rule.
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
        if self.trusted_examples and reference is not None:
            check_update(reference, updates.shape[1])
            if not np.isfinite(reference).all():
                raise ConfigError("the server's own update holds NaN or infinity")
            return self._aggregate_beside(updates, weights, reference)
        return self._aggregate(updates, weights)

    def stream(self, d: int, capacity: int, reference: Vector | None = None) -> Stream:
        """Return an empty stream of (d,) updates; this one holds them all, a sum need not.

        Args:
          d: Coordinates of each update.
          capacity: Updates at most.
          reference: See :meth:`__call__`.

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
        return Rows(self, d, capacity, reference)


class Rows(Stream):
    """The updates of a rule that compares them, in the order of their slots.

    4 d bytes per update, in one block of memory that becomes real row by row; ``result`` closes the
    gaps of absent slots in place, so that no second block is needed.
    """

    def __init__(
        self, aggregator: Aggregator, d: int, capacity: int, reference: Vector | None = None
    ) -> None:
        if d < 0 or capacity < 0:
            raise ConfigError(f"a stream needs d >= 0 and capacity >= 0, not {d} and {capacity}")
        try:
            self._rows = np.empty((capacity, d), np.float32)
        except (MemoryError, ValueError):
            raise ConfigError(
                f"aggregator={aggregator.name} holds all updates, {4 * capacity * d / 2**30:.0f} "
                "GiB; lower clients_per_round or choose aggregator=mean"
            ) from None
        self._aggregator, self._reference = aggregator, reference
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
        return self._aggregator(rows, self._weights[slots], self._reference)


def check_update(update: Vector, d: int) -> None:
    """Raise a ConfigError unless the update is (d,) float32."""
    if update.dtype != np.float32 or update.shape != (d,):
        raise ConfigError(
            f"expected float32 of shape ({d},), not {update.dtype} of shape {update.shape}"
        )
