"""Masked sums of random groups, and a robust rule over them (Karimireddy et al. 2022)."""

from __future__ import annotations

from fedq.errors import ConfigError
from fedq.keys import SMALLEST_SUM
from fedq.privacy.base import Privacy
from fedq.registry import register
from fedq.secagg.base import Masked, shuffled_groups


@register("secure_aggregation", "grouped")
class Grouped(Masked):
    """The server learns the weighted sum of each group; ``aggregator`` combines the groups' means.

    Groups are drawn anew in each round. A rule that tolerates f bad rows tolerates f groups that
    hold a bad client.

    Args:
      group_size: Clients of a group, at least.

    Reference:
      Karimireddy, He and Jaggi 2022, "Byzantine-robust learning on heterogeneous datasets via
      bucketing"; the groups are their buckets.
    """

    group_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < SMALLEST_SUM:
            raise ConfigError(
                f"secure_aggregation.group_size must be at least {SMALLEST_SUM}, "
                f"not {self.group_size}"
            )

    def groups(self, clients: int, seed: int) -> list[list[int]]:
        """Return random groups."""
        return shuffled_groups(clients, self.group_size, seed)

    def _check_rule(self, aggregator: str) -> None:
        """Any rule over the groups' means will do."""

    def _check_privacy(self, privacy: Privacy) -> None:
        super()._check_privacy(privacy)
        if privacy.integers:
            raise ConfigError(
                f"privacy={privacy.name} states what a sum of the whole cohort tells, and "
                "secure_aggregation=grouped shows sums of groups, with a share of that noise; "
                "choose secure_aggregation=secagg"
            )
