"""Classes shared out by Dirichlet draws, Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fedq.data.partitions.base import Disjoint, Indices
from fedq.errors import ConfigError
from fedq.registry import register


@register("partition", "dirichlet")
class Dirichlet(Disjoint):
    """Share out every class by its own Dirichlet draw over clients.

    For class k with n_k rows, ``p ~ Dir(alpha, ..., alpha)`` and client i gets about ``p_i n_k`` of
    them (Yurochkin et al. 2019, Section 4; Hsu et al. 2019 draw per client instead). Both amount of
    data and classes then differ between clients: small alpha, few clients per class; large alpha,
    equal shares.

    Args:
      alpha: Concentration, greater than 0; 0.5 is a usual choice, 0.1 severe.
      min_examples: Every client gets at least this many rows, taken at random from the largest
        clients, whenever there are ``clients * min_examples`` rows; with fewer rows it is ignored.

    Example:
      >>> parts = Dirichlet(alpha=0.1).split(np.arange(1000) % 10, clients=20, seed=0)
      >>> sum(part.size for part in parts), min(part.size for part in parts) >= 1
      (1000, True)

    Reference:
      Yurochkin et al. 2019, "Bayesian nonparametric federated learning of neural networks".
      Hsu et al. 2019, "Measuring the effects of non-identical data distribution for federated
      visual classification".
    """

    alpha: float = 0.5
    min_examples: int = 1

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"alpha": 1e-3},
        {"alpha": 100.0, "min_examples": 5},
        {"alpha": 0.1, "min_examples": 0},
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"partition.alpha must be positive, not {self.alpha}")
        if self.min_examples < 0:
            raise ConfigError(f"partition.min_examples must be >= 0, not {self.min_examples}")

    def _owners(
        self, labels: Indices, clients: int, rng: np.random.Generator, groups: Indices | None
    ) -> Indices:
        owners = np.empty(labels.size, np.int64)
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = np.cumsum(rng.dirichlet(np.full(clients, self.alpha)))
            ends = np.rint(shares[:-1] * rows.size).astype(np.int64)
            counts = np.diff(ends, prepend=0, append=rows.size)
            owners[rows] = np.repeat(np.arange(clients), counts)
        if labels.size >= clients * self.min_examples:
            self._fill(owners, clients, rng)
        return owners

    def _fill(self, owners: Indices, clients: int, rng: np.random.Generator) -> None:
        """Move rows of the largest clients to those below ``min_examples``, in place."""
        counts = np.bincount(owners, minlength=clients)
        needy = np.flatnonzero(counts < self.min_examples)
        largest = [(-int(count), client) for client, count in enumerate(counts)]
        heapq.heapify(largest)
        spare: dict[int, list[int]] = {}  # rows of donors, shuffled once
        for client in needy:
            for _ in range(self.min_examples - counts[client]):
                count, donor = largest[0]
                if donor not in spare:
                    spare[donor] = rng.permutation(np.flatnonzero(owners == donor)).tolist()
                owners[spare[donor].pop()] = client
                heapq.heapreplace(largest, (count + 1, donor))
