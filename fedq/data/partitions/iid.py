"""Equal random shares, McMahan et al. 2017, https://arxiv.org/abs/1602.05629."""

from __future__ import annotations

import numpy as np

from fedq.data.partitions.base import Disjoint, Indices, deal
from fedq.registry import register


@register("partition", "iid")
class Iid(Disjoint):
    """Shuffle the rows and cut them into equal shares (McMahan et al. 2017, Section 3).

    Sizes differ by at most one row.

    Example:
      >>> [part.size for part in Iid().split(np.zeros(10, int), clients=3, seed=0)]
      [4, 3, 3]
    """

    def _owners(
        self, labels: Indices, clients: int, rng: np.random.Generator, groups: Indices | None
    ) -> Indices:
        return deal(rng.permutation(labels.size), clients)
