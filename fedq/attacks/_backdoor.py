"""What backdoors share: a trigger, rows that carry it, and updates that push it through."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.attacks.base import Accomplice, Inputs, Labels, Rows, VectorAttack
from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.random import derive, generator

Mask = NDArray[np.bool_]


class Backdoor(VectorAttack):
    """Hostile clients train honestly on rows of which a share teaches another behaviour.

    The model stays right on all else. Updates may be boosted, so that a few clients outvote a mean,
    and shortened to the length of honest ones, so that nothing about their size is unusual.

    Attributes:
      target: The class that the attacker wants.
      share: Of a hostile client's rows, those that are poisoned.
      boost: Times the own update; None is n / m of n clients with m hostile, which replaces the
        model by theirs under a mean.
      limit: The longest update, of the honest median; None is any.
    """

    strength = "boost"
    target: int
    share: float
    boost: float | None
    limit: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target < 0:
            raise ConfigError(f"attack.target must be a class from 0, not {self.target}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"attack.share must lie in (0, 1], not {self.share}")
        for option in ("boost", "limit"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise ConfigError(f"attack.{option} must be positive, or null, not {value}")

    @abc.abstractmethod
    def _poisoned(self, x: Inputs, y: Labels, chosen: Labels, client: Accomplice) -> Inputs:
        """Return what stands in the chosen rows of a client, (len(chosen), ...)."""

    def poison(self, x: Inputs, y: Labels, client: Accomplice) -> tuple[Inputs, Labels]:
        """Return the rows, a share of which has another input and the attacker's class."""
        count = max(1, round(self.share * len(y))) if len(y) else 0
        chosen = generator(derive(client.seed, "poison")).choice(len(y), count, replace=False)
        poisoned, wrong = x.copy(), y.copy()
        poisoned[chosen], wrong[chosen] = self._poisoned(x, y, chosen, client), self.target
        return poisoned, wrong

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        boost = (len(own) + len(others)) / len(own) if self.boost is None else self.boost
        deltas = boost * own
        if self.limit is not None:
            usual = np.median(np.linalg.norm(others if len(others) else own, axis=1))
            lengths = np.linalg.norm(deltas, axis=1, keepdims=True)
            deltas *= np.minimum(1, self.limit * usual / np.maximum(lengths, 1e-30))
        return np.asarray(deltas)

    def harm(self, result: Vector, own: Rows, others: Rows) -> float:
        """Return minus the distance of an aggregate from the attackers' own mean update."""
        return -float(np.linalg.norm(result - own.mean(axis=0)))

    def _aimed(self, y: Labels, classes: int) -> Labels:
        if self.target >= classes:
            raise ConfigError(
                f"attack.target is {self.target}, but the task has {classes} classes from 0"
            )
        return np.full(len(y), self.target, np.int64)


class PatchBackdoor(Backdoor):
    """A backdoor whose trigger is a patch of the largest value in the last corner.

    The last ``size`` rows and columns of an image, the last steps of a series, the last features;
    in all channels.

    Attributes:
      size: Of the patch.
    """

    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ConfigError(f"attack.size must be at least 1, not {self.size}")

    def probe(self, x: Inputs, y: Labels, classes: int, high: float) -> tuple[Inputs, Labels]:
        """Return the examples of all other classes with the whole trigger."""
        chosen = np.flatnonzero(y != self.target)
        if len(chosen) == 0:
            raise ConfigError(f"all test examples are of class {self.target}; choose attack.target")
        return stamped(x[chosen], patch(x.shape[1:], self.size), high), self._aimed(chosen, classes)


def patch(shape: tuple[int, ...], size: int) -> Mask:
    """Return where the patch is in an example of a shape, channels first.

    >>> patch((1, 3, 3), 2).astype(int).tolist()
    [[[0, 0, 0], [0, 1, 1], [0, 1, 1]]]
    """
    mask = np.zeros(shape, np.bool_)
    corner: list[Any] = [slice(max(0, length - size), None) for length in shape[1:] or shape]
    mask[..., *corner] = True
    return mask


def stamped(x: Inputs, mask: Mask, high: float) -> Inputs:
    """Return a copy of (n, ...) inputs with the masked values at ``high``."""
    return np.where(mask, np.float32(high), x)
