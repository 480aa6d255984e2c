"""Clients that draw their own rows, Hsu et al. 2019, https://arxiv.org/abs/1909.06335."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.data.partitions.base import Indices, Partition, Parts
from fedq.errors import ConfigError
from fedq.random import derive, generator
from fedq.registry import register


@register("partition", "draws")
class Draws(Partition):
    """Give each client a sample of the rows of its own: any number of clients from any data.

    Client i draws the shares of classes that it sees, ``q ~ Dir(alpha p)`` with p those of the
    data, and then ``rows`` rows by them, none twice (Hsu et al. 2019, Section 3). Its rows follow
    from the seed and i alone and are drawn when it trains, so that a client which is never asked
    costs nothing. **Clients share rows** once they want more of a class than there are, and by
    chance before: with 100,000 clients of 20 rows of 4,000, each row is at 500 of them. So this
    measures what a large federation costs, and not what more data would gain.

    Args:
      rows: Of each client.
      alpha: Concentration, greater than 0; None takes rows without looking at classes.

    Example:
      >>> parts = Draws(rows=5).split(np.arange(1000) % 10, clients=10**6, seed=0)
      >>> len(parts), len(parts[999_999])
      (1000000, 5)

    Reference:
      Hsu et al. 2019, "Measuring the effects of non-identical data distribution for federated
      visual classification".
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"rows": 5}, {"rows": 3, "alpha": 0.1})

    rows: int = 20
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"partition.rows must be at least 1, not {self.rows}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"partition.alpha must be positive, or null, not {self.alpha}")

    def _split(self, labels: Indices, clients: int, seed: int, groups: Indices | None) -> Drawn:
        if self.rows > labels.size:
            raise ConfigError(
                f"partition=draws gives each client {self.rows} rows, but there are {labels.size}; "
                "set partition.rows"
            )
        order = np.argsort(labels, kind="stable")
        counts = np.unique(labels, return_counts=True)[1]
        return Drawn(self, clients, derive(seed, "partition", self.name), order, counts)


@dataclass(frozen=True)
class Drawn(Parts):
    """Parts that follow from the client's number: no memory per client.

    Args:
      partition: How rows are drawn.
      clients: How many there are.
      seed: Of all draws.
      order: (n,) rows, sorted by class.
      counts: (classes,) rows of each class.
    """

    partition: Draws
    clients: int
    seed: int
    order: Indices
    counts: Indices

    def __len__(self) -> int:
        """How many clients there are."""
        return self.clients

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(clients,) how many rows each has: all alike."""
        return np.broadcast_to(np.int64(self.partition.rows), self.clients)

    def rows(self, client: int) -> Indices:
        """Return the rows of one client."""
        rng, wanted = generator(derive(self.seed, client)), self.partition.rows
        taken = np.zeros(self.order.size, np.bool_)
        if self.partition.alpha is not None:
            shares = rng.dirichlet(self.partition.alpha * self.counts / self.order.size)
            ends = np.cumsum(self.counts)
            for end, count, drawn in zip(
                ends, self.counts, rng.multinomial(wanted, shares), strict=True
            ):
                # A class may have fewer rows than a client wants of it.
                taken[end - count + rng.choice(count, min(drawn, count), replace=False)] = True
        left = np.flatnonzero(~taken)
        missing = wanted - (self.order.size - left.size)
        taken[left[rng.choice(left.size, missing, replace=False)]] = True
        return np.sort(self.order[taken])

    def filled(self) -> Drawn:
        """Return this: everybody has rows."""
        return self
