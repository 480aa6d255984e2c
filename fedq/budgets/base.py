"""What a bit budget is: a factor on the levels of a codec, by client and round."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedq import registry
from fedq.codecs.base import Codec
from fedq.errors import ConfigError


@dataclass(frozen=True)
class Candidate:
    """One client that is about to be asked.

    Attributes:
      examples: It last claimed to have; None if it has not been heard of.
      uplink_mbps: Of its link; None without a fleet.
      median_mbps: Of the fleet's uplinks.
    """

    examples: int | None = None
    uplink_mbps: float | None = None
    median_mbps: float | None = None


@dataclass(frozen=True)
class History:
    """What budgets follow; part of a run's state.

    Attributes:
      losses: Training losses of rounds, oldest first; a round without one is left out.
      level: What a schedule has come to, times the codec's levels.
      changed: Rounds with a loss when it last changed.
      examples: By node, what it last claimed.
    """

    losses: tuple[float, ...] = ()
    level: float = 1.0
    changed: int = 0
    examples: Mapping[int, int] = field(default_factory=dict)

    def to_meta(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_meta` reads."""
        examples = {str(node): count for node, count in self.examples.items()}
        return {**dataclasses.asdict(self), "losses": list(self.losses), "examples": examples}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> History:
        """Read what :meth:`to_meta` wrote."""
        examples = {int(node): int(count) for node, count in meta["examples"].items()}
        losses = tuple(map(float, meta["losses"]))
        return cls(losses, float(meta["level"]), int(meta["changed"]), examples)


class Budget(abc.ABC):
    """Decides how finely each client quantizes; registered, frozen.

    A budget names factors on the number of the codec's levels; twice as many are one bit more. What
    that comes to in bytes is the codec's business, and measured.
    """

    group: ClassVar[str] = "budget"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Whether every client has the configured codec in every round.
    fixed: ClassVar[bool] = False
    #: Whether it looks at links: it needs a fleet.
    links: ClassVar[bool] = False

    @property
    def min_bits(self) -> int:
        """The fewest bits that a level may have."""
        return 1

    @property
    def max_bits(self) -> int:
        """The most."""
        return 16

    def __post_init__(self) -> None:
        if not 1 <= self.min_bits <= self.max_bits <= 16:
            raise ConfigError(
                "budget.min_bits and max_bits must be 1 to 16, and min_bits no more than max_bits, "
                f"not {self.min_bits} and {self.max_bits}"
            )

    @abc.abstractmethod
    def factors(
        self, history: History, cohort: Sequence[Candidate], bits: float, size: int
    ) -> list[float]:
        """Return a factor on the codec's levels for each of the clients that are asked together.

        Args:
          history: Of the rounds so far.
          cohort: The clients.
          bits: Binary logarithm of the codec's levels.
          size: Coordinates of an update.
        """

    def after(self, history: History, loss: float | None, examples: Mapping[int, int]) -> History:
        """Return the history after a round."""
        losses = history.losses if loss is None else (*history.losses, loss)
        known = {**history.examples, **examples}
        return dataclasses.replace(history, losses=losses, examples=known)

    def codecs(
        self, codec: Codec, history: History, cohort: Sequence[Candidate], size: int
    ) -> list[Codec]:
        """Return the codec of each of the clients that are asked together."""
        bits = bits_of(codec)
        factors = self.factors(history, cohort, bits, size)
        return [self._scaled(codec, bits, factor) for factor in factors]

    def _scaled(self, codec: Codec, bits: float, factor: float) -> Codec:
        wanted = min(max(bits + math.log2(factor), self.min_bits), self.max_bits)
        return codec if wanted == bits else with_bits(codec, wanted)


def bits_of(codec: Codec) -> float:
    """Return the binary logarithm of a codec's levels, or of those of the codec inside it.

    Raises:
      ConfigError: If it has none.

    Example:
      >>> bits_of(registry.build("codec", "uniform", bits=4))
      4.0
    """
    known = registry.fields(type(codec))
    if "bits" in known:
        return float(getattr(codec, "bits"))  # noqa: B009 - not all codecs have it
    if "levels" in known:
        return math.log2(getattr(codec, "levels") + 1)  # noqa: B009
    if "inner" in known:
        return bits_of(getattr(codec, "inner"))  # noqa: B009
    raise ConfigError(
        f"a budget needs a codec with bits or levels, such as uniform or qsgd, not {codec.name}"
    )


def with_bits(codec: Codec, bits: float) -> Codec:
    """Return the codec with another number of levels; whole ones, or whole bits, where it must.

    Example:
      >>> with_bits(registry.build("codec", "qsgd", levels=7), 4.0).levels
      15
    """
    known = registry.fields(type(codec))
    if "bits" in known:
        exact = bits if known["bits"].type is float else round(bits)
        return dataclasses.replace(codec, bits=exact)  # type: ignore[type-var]
    if "levels" in known:
        return dataclasses.replace(codec, levels=max(round(2**bits) - 1, 1))  # type: ignore[type-var]
    inner = with_bits(getattr(codec, "inner"), bits)  # noqa: B009
    return dataclasses.replace(codec, inner=inner)  # type: ignore[type-var]
