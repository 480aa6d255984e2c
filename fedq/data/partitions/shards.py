"""A few classes per client, McMahan et al. 2017, https://arxiv.org/abs/1602.05629."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fedq.data.partitions.base import Disjoint, Indices, deal
from fedq.errors import ConfigError
from fedq.registry import register


@register("partition", "shards")
class Shards(Disjoint):
    """Sort rows by class, cut them into shards, and give every client a few at random.

    With s shards per client of balanced classes most clients see at most s classes: the
    "pathological non-IID" split of McMahan et al. 2017, Section 3.

    Args:
      shards_per_client: Shards of every client.

    Example:
      >>> parts = Shards(shards_per_client=1).split(np.repeat([0, 1], 50), clients=10, seed=0)
      >>> [part.size for part in parts] == [10] * 10
      True
    """

    shards_per_client: int = 2

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"shards_per_client": 5})

    def __post_init__(self) -> None:
        if self.shards_per_client < 1:
            raise ConfigError("partition.shards_per_client must be at least 1")

    def _owners(
        self, labels: Indices, clients: int, rng: np.random.Generator, groups: Indices | None
    ) -> Indices:
        shuffled = rng.permutation(labels.size)  # which rows of a class share a shard
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shards = clients * self.shards_per_client
        owner_of_shard = rng.permutation(shards) // self.shards_per_client
        return np.asarray(owner_of_shard[deal(by_class, shards)])
