"""What every partition is: a seeded way to give training rows to clients."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.random import derive, generator

Indices = NDArray[np.int64]


class Parts(Sequence[Indices]):
    """The rows of every client, each made when it is asked for: a sorted array of int64."""

    @property
    @abc.abstractmethod
    def sizes(self) -> NDArray[np.int64]:
        """(clients,) how many rows each has."""

    @abc.abstractmethod
    def rows(self, client: int) -> Indices:
        """Return the rows of one client, 0 <= client < len(self)."""

    @abc.abstractmethod
    def filled(self) -> Parts:
        """Return the parts of the clients that have rows."""

    @overload
    def __getitem__(self, client: int) -> Indices: ...

    @overload
    def __getitem__(self, client: slice) -> list[Indices]: ...

    def __getitem__(self, client: int | slice) -> Indices | list[Indices]:
        """Return the rows of a client, or of several."""
        if isinstance(client, slice):
            return [self.rows(i) for i in range(*client.indices(len(self)))]
        return self.rows(range(len(self))[client])


class Shares(Parts):
    """Parts that are kept: 8 bytes per client and 4 per row.

    Args:
      rows: (n,) rows, those of client 0 first.
      ends: (clients + 1,) where each client's begin in ``rows``, and the end.

    Example:
      >>> shares = Shares.of([np.array([1, 2]), np.array([], int), np.array([0])])
      >>> shares[2], shares.sizes, list(shares.filled())
      (array([0]), array([2, 0, 1]), [array([1, 2]), array([0])])
    """

    def __init__(self, rows: NDArray[np.integer[Any]], ends: Indices) -> None:
        narrow = not rows.size or rows.max() < 2**31
        self._rows: NDArray[np.integer[Any]] = rows.astype(np.int32 if narrow else np.int64)
        self._ends = ends

    @classmethod
    def of(cls, parts: Iterable[Indices]) -> Shares:
        """Keep what any sequence holds."""
        parts = list(parts)
        rows = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
        return cls(rows, np.cumsum([0, *map(len, parts)], dtype=np.int64))

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self._ends) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(clients,) how many rows each has."""
        return np.diff(self._ends)

    def rows(self, client: int) -> Indices:
        """Return the rows of one client."""
        return self._rows[self._ends[client] : self._ends[client + 1]].astype(np.int64)

    def filled(self) -> Shares:
        """Return the parts of the clients that have rows."""
        return Shares(self._rows, np.concatenate([self._ends[:1], self._ends[1:][self.sizes > 0]]))


class Partition(abc.ABC):
    """A map from clients to rows.

    Subclasses are registered frozen dataclasses: of :class:`Disjoint`, or with a :meth:`_split` of
    their own.
    """

    group: ClassVar[str] = "partition"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abc.abstractmethod
    def _split(self, labels: Indices, clients: int, seed: int, groups: Indices | None) -> Parts:
        """Return the parts for checked arguments."""

    def split(
        self,
        labels: NDArray[np.integer[Any]],
        clients: int,
        seed: int,
        groups: NDArray[np.integer[Any]] | None = None,
    ) -> Parts:
        """Share rows out.

        Args:
          labels: (n,) class of every training row.
          clients: How many clients there are, at least 1.
          seed: Any integer; the result depends on it and the other arguments alone.
          groups: (n,) client id of every row, if the data has any (``Dataset.client_train``).

        Returns:
          One sorted array of row indices per client, int64; a client may get none.

        Raises:
          ConfigError: If the rows cannot be shared out this way.
        """
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
            raise ConfigError("a partition needs (n,) integer labels of at least one row")
        if clients < 1:
            raise ConfigError(f"clients must be at least 1, not {clients}")
        if groups is not None and np.shape(groups) != labels.shape:
            raise ConfigError(
                f"there are {labels.size} rows but client ids of shape {np.shape(groups)}"
            )
        ids = None if groups is None else np.asarray(groups).astype(np.int64)
        return self._split(labels.astype(np.int64), clients, seed, ids)


class Disjoint(Partition):
    """A partition in the strict sense: every row has one client.

    Subclasses implement :meth:`_owners`.
    """

    @abc.abstractmethod
    def _owners(
        self, labels: Indices, clients: int, rng: np.random.Generator, groups: Indices | None
    ) -> Indices:
        """Return the client of every row, (n,) in 0..clients-1."""

    def _split(self, labels: Indices, clients: int, seed: int, groups: Indices | None) -> Shares:
        rng = generator(derive(seed, "partition", self.name))
        owners = self._owners(labels, clients, rng, groups)
        counts = np.bincount(owners, minlength=clients)
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Shares(np.argsort(owners, kind="stable"), ends)


def deal(order: Indices, clients: int) -> Indices:
    """Return owners that cut rows, in a given order, into ``clients`` runs of near-equal length.

    >>> deal(np.array([3, 1, 0, 2]), 2)
    array([1, 0, 1, 0])
    """
    owners = np.empty(order.size, np.int64)
    owners[order] = np.arange(order.size) * clients // order.size
    return owners
