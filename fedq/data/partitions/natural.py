"""The data's own clients, as in LEAF, Caldas et al. 2018, https://arxiv.org/abs/1812.01097."""

from __future__ import annotations

import numpy as np

from fedq.data.partitions.base import Disjoint, Indices
from fedq.errors import ConfigError
from fedq.registry import register


@register("partition", "natural")
class Natural(Disjoint):
    """Keep together what one person, device or place recorded (LEAF, Caldas et al. 2018).

    With as many clients as ids, client i holds the i-th id. With fewer, the ids are shuffled and
    dealt out, so that the numbers of ids per client differ by at most one.

    Example:
      >>> ids = np.array([0, 1, 0, 2])
      >>> list(Natural().split(np.zeros(4, int), clients=3, seed=0, groups=ids))
      [array([0, 2]), array([1]), array([3])]
    """

    def _owners(
        self, labels: Indices, clients: int, rng: np.random.Generator, groups: Indices | None
    ) -> Indices:
        if groups is None:
            raise ConfigError(
                "partition=natural needs a client id per training row, which this data does not "
                "have; choose partition=dirichlet, or give data=npz a client_train array"
            )
        ids, group = np.unique(groups, return_inverse=True)
        if clients > ids.size:
            raise ConfigError(
                f"partition=natural has {ids.size} client ids for clients={clients}; "
                f"set clients to at most {ids.size}"
            )
        owner_of_id = np.arange(ids.size) % clients
        if clients < ids.size:
            owner_of_id = rng.permutation(owner_of_id)
        return np.asarray(owner_of_id[group])
