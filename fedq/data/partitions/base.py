"""What every partition is: a seeded way to give training rows to clients."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.random import derive, generator

Indices = NDArray[np.int64]


class Partition(abc.ABC):
    """A map from rows to clients.

    Subclasses are registered frozen dataclasses that implement :meth:`_owners`.
    """

    group: ClassVar[str] = "partition"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abc.abstractmethod
    def _owners(
        self, labels: Indices, clients: int, rng: np.random.Generator, groups: Indices | None
    ) -> Indices:
        """Return the client of every row, (n,) in 0..clients-1."""

    def split(
        self,
        labels: NDArray[np.integer[Any]],
        clients: int,
        seed: int,
        groups: NDArray[np.integer[Any]] | None = None,
    ) -> list[Indices]:
        """Share rows out.

        Args:
          labels: (n,) class of every training row.
          clients: How many clients there are, at least 1.
          seed: Any integer; the result depends on it and the other arguments alone.
          groups: (n,) client id of every row, if the data has any (``Dataset.client_train``).

        Returns:
          One sorted array of row indices per client, int64: disjoint, together all n rows. A client
          may get none.

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
        rng = generator(derive(seed, "partition", self.name))
        owners = self._owners(labels.astype(np.int64), clients, rng, ids)
        rows = np.argsort(owners, kind="stable").astype(np.int64)
        return np.split(rows, np.cumsum(np.bincount(owners, minlength=clients))[:-1])


def deal(order: Indices, clients: int) -> Indices:
    """Return owners that cut rows, in a given order, into ``clients`` runs of near-equal length.

    >>> deal(np.array([3, 1, 0, 2]), 2)
    array([1, 0, 1, 0])
    """
    owners = np.empty(order.size, np.int64)
    owners[order] = np.arange(order.size) * clients // order.size
    return owners
