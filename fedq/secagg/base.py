"""What a mode of secure aggregation is."""

from __future__ import annotations

import abc
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedq.errors import ConfigError
from fedq.keys import SMALLEST_SUM, Roster
from fedq.privacy.base import Privacy
from fedq.random import derive, generator
from fedq.secagg._coordinator import Coordinator
from fedq.secagg._grid import Grid, Integers
from fedq.secagg._messages import PHASES, Announcement

#: Neighbours of a client where the graph is complete, and where it is not.
COMPLETE, REGULAR = 200, 100


class Collector(Protocol):
    """Collects one group's integers, phase by phase; :class:`fedq.secagg.Coordinator` is one."""

    announcement: Announcement

    @property
    def survivors(self) -> list[Hashable]:
        """Those whose integers are in the sum."""

    def proven(self, who: Hashable) -> int | None:
        """Return the client number that one has proven to have, None if there is no proof."""

    def messages(self, phase: str) -> dict[Hashable, bytes]:
        """Return what a phase asks of whom."""

    def receive(self, phase: str, who: Hashable, answer: bytes | memoryview) -> None:
        """Accept an answer."""

    def sums(self) -> list[Integers]:
        """Return the sums."""


class SecureAggregation:
    """What the server learns of each update; frozen, registered, chosen by an option."""

    group: ClassVar[str] = "secure_aggregation"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Whether clients send integers of a common grid, and not payloads of the codec.
    integers: ClassVar[bool] = False
    #: Whether the server sees sums of them only, from clients that prove their numbers.
    masked: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class OnGrid(SecureAggregation, abc.ABC):
    """A mode in which clients send integers of a common grid (:class:`fedq.secagg.Grid`).

    Args:
      bits: Of an update's code.
      clip: Coordinates of an update are clamped to +-clip.
      rotate: Rotate updates first, which makes all coordinates alike in size.
      state_clip: A change of the state is clamped to +-state_clip.
    """

    integers: ClassVar[bool] = True
    #: What clients are asked for, in turn.
    phases: ClassVar[tuple[str, ...]] = ()

    bits: int = 8
    clip: float = 0.25
    rotate: bool = False
    state_clip: float = 256.0

    def __post_init__(self) -> None:
        if max(self.clip, self.state_clip) > 8192:
            raise ConfigError("secure_aggregation.clip and state_clip must be at most 8192")
        self.grid(1)  # checks the rest

    def grid(self, max_weight: int) -> Grid:
        """Return the grid for weights up to ``max_weight``."""
        return Grid(
            bits=self.bits,
            clip=self.clip,
            max_weight=max_weight,
            rotate=self.rotate,
            state_clip=self.state_clip,
        )

    def groups(self, clients: int, seed: int) -> list[list[int]]:
        """Return places in the cohort, by group: one sum comes of each."""
        return [list(range(clients))]

    def check(
        self, *, clients: int | None, max_weight: int, aggregator: str, privacy: Privacy
    ) -> None:
        """Refuse what cannot work, before a run starts.

        Args:
          clients: Cohort of a round; None if it is not known yet.
          max_weight: Of one client.
          aggregator: Name of the rule.
          privacy: The mechanism.

        Raises:
          ConfigError: If rule or mechanism need single updates, the cohort is too small, or a
            coordinate's sum does not fit.
        """
        self._check_rule(aggregator)
        self._check_privacy(privacy)
        if privacy.integers:
            return  # its codes have a modulus of their own
        grid = self.grid(max_weight)
        grid.segments(max(map(len, self.groups(clients, 0))) if clients else 1, 1, 0)

    def _check_rule(self, aggregator: str) -> None:
        if aggregator != "mean":
            raise ConfigError(
                f"aggregator={aggregator} compares single updates, which "
                f"secure_aggregation={self.name} does not have; use aggregator=mean, or "
                "secure_aggregation=grouped, which applies it to the means of groups"
            )

    def _check_privacy(self, privacy: Privacy) -> None:
        if privacy.unit is not None and not privacy.integers:
            raise ConfigError(
                f"privacy={privacy.name} needs what secure_aggregation={self.name} does not show "
                "the server: single updates to clip, or each client's number of examples; choose "
                "a mechanism on integers (privacy=skellam, discrete_gaussian or poisson_binomial), "
                "or secure_aggregation=none"
            )

    @abc.abstractmethod
    def numbers(self, clients: int) -> dict[str, int]:
        """Return the neighbours and the threshold to announce to a group of so many clients."""

    @abc.abstractmethod
    def collector(
        self,
        announcement: Announcement,
        identity: Ed25519PrivateKey,
        roster: Roster,
        whos: Iterable[Hashable],
    ) -> Collector:
        """Return what collects the integers of one group."""


@dataclass(frozen=True, kw_only=True)
class Masked(OnGrid):
    """A mode in which integers are masked.

    Args:
      threshold: More than this fraction of a neighbourhood must stay to the end; it must also
        exceed the fraction that could lie together with the server by as much as one half.
      neighbours: That each client shares masks with; 0 is all up to 200, and 100 of more.
    """

    phases: ClassVar[tuple[str, ...]] = PHASES
    masked: ClassVar[bool] = True

    threshold: float = 2 / 3
    neighbours: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 <= self.threshold < 1:
            raise ConfigError(
                f"secure_aggregation.threshold must be in [0.5, 1), not {self.threshold}"
            )
        if self.neighbours % 2 or not 0 <= self.neighbours <= 1000:
            raise ConfigError(
                "secure_aggregation.neighbours must be an even number up to 1000, or 0, not "
                f"{self.neighbours}"
            )

    def numbers(self, clients: int) -> dict[str, int]:
        """Return the neighbours and the threshold to announce to a group of so many clients."""
        neighbours = self.neighbours or (clients if clients <= COMPLETE else REGULAR)
        nearby = min(neighbours, clients - 1) + 1
        return {
            "neighbours": neighbours,
            "threshold": math.floor(self.threshold * nearby) + 1,
        }

    def check(
        self, *, clients: int | None, max_weight: int, aggregator: str, privacy: Privacy
    ) -> None:
        """Refuse too small a cohort, too."""
        super().check(
            clients=clients, max_weight=max_weight, aggregator=aggregator, privacy=privacy
        )
        if clients is not None and clients < SMALLEST_SUM:
            raise ConfigError(
                f"secure_aggregation={self.name} needs at least {SMALLEST_SUM} clients per round, "
                f"not {clients}: less would show single updates"
            )

    def collector(
        self,
        announcement: Announcement,
        identity: Ed25519PrivateKey,
        roster: Roster,
        whos: Iterable[Hashable],
    ) -> Collector:
        """Return the protocol's server."""
        return Coordinator(announcement, identity, roster, whos)


def shuffled_groups(clients: int, size: int, seed: int) -> list[list[int]]:
    """Return random groups of at least ``size`` places, as equal as can be, each sorted.

    >>> [len(group) for group in shuffled_groups(11, 3, seed=0)]
    [4, 4, 3]
    """
    order = generator(derive(seed, "groups")).permutation(clients).tolist()
    count = max(1, clients // size)
    return [sorted(order[start::count]) for start in range(count)]
