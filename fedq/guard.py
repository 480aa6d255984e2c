"""The guard between wire and aggregator: what is well-formed may still be hostile.

Decoders refuse what no encoder writes (scales that are not finite or not positive, codes off their
grid, other layouts), and the strategy what does not belong (stale rounds, second answers, wrong
seeds, another's number). What is left is judged here by its size, relative to what the cohort
sends, and by who keeps sending what must be refused.

The sum of a mean takes one update at a time, so the cohort's median cannot wait for the cohort: the
yardstick is the median of the last rounds' medians, three numbers that live in the run's state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fedq.errors import ConfigError, FedqError
from fedq.layout import Vector
from fedq.registry import register

#: Rounds whose medians make the yardstick: a jump of all clients is believed in the third round.
MEMORY = 3
#: Rejections that an honest client does not cause; the others are bad luck.
HOSTILE = frozenset({"malformed", "stale", "unexpected", "seed", "out of range", "norm", "peak"})


class RejectedError(Exception):
    """A reply that does not count; the kind is what is counted."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Size:
    """How large an update is.

    Attributes:
      norm: Euclidean norm of the delta.
      peak: Largest magnitude of the delta: what an inflated scale shows in.
      state: Largest magnitude of what is averaged but not trained; 0 as a yardstick is unknown.
    """

    norm: float
    peak: float
    state: float

    @classmethod
    def of(cls, delta: Vector, state: Vector) -> Size:
        """Measure an update; in float64, without a copy of it.

        >>> Size.of(np.array([3, -4], np.float32), np.zeros(0, np.float32))
        Size(norm=5.0, peak=4.0, state=0.0)
        """
        norm = float(np.sqrt(np.einsum("i,i->", delta, delta, dtype=np.float64)))
        return cls(norm, _peak(delta), _peak(state))


def _peak(values: Vector) -> float:
    return max(float(values.max()), -float(values.min())) if values.size else 0.0


def _median(sizes: Collection[Size]) -> Size:
    columns = np.array([dataclasses.astuple(size) for size in sizes])
    return Size(*np.median(columns, axis=0).tolist())


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers; part of a run's state.

    Attributes:
      medians: Of the last rounds, oldest first.
      strikes: By node, hostile replies in a row.
      barred: By node, the last round in which it is not asked.
      registered: By client number, the examples that it first claimed.
    """

    medians: tuple[Size, ...] = ()
    strikes: Mapping[int, int] = field(default_factory=dict)
    barred: Mapping[int, int] = field(default_factory=dict)
    registered: Mapping[int, int] = field(default_factory=dict)

    def barred_in(self, server_round: int) -> frozenset[int]:
        """Return the nodes that are not to be asked in a round."""
        return frozenset(node for node, last in self.barred.items() if last >= server_round)

    def to_meta(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_meta` reads."""
        return {
            "medians": [list(dataclasses.astuple(size)) for size in self.medians],
            "strikes": {str(node): count for node, count in self.strikes.items()},
            "barred": {str(node): last for node, last in self.barred.items()},
            "registered": {str(client): count for client, count in self.registered.items()},
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> GuardState:
        """Read what :meth:`to_meta` wrote."""
        named = {
            name: {int(key): int(value) for key, value in meta[name].items()}
            for name in ("strikes", "barred", "registered")
        }
        return cls(medians=tuple(Size(*map(float, size)) for size in meta["medians"]), **named)


@register("guard", "relative")
class Guard:
    """Refuse updates out of proportion, and stop asking clients that keep sending such.

    An update is rejected as ``norm`` if its norm exceeds ``norm_limit`` times the yardstick, and as
    ``peak`` if its largest coordinate (or that of its state) exceeds ``peak_limit`` times. The
    yardstick is the median over the last three rounds of the cohort's median, rejected updates
    included: a minority of hostile clients does not move it, and if all honest updates grow, it
    follows. Before the first round it is the model itself, and a model of zeros has none.

    The default limits are far from any honest update, so they change no honest run. Against a mean,
    choose lower ones, or ``norm_clip``, or a robust aggregator.

    Args:
      norm_limit: Times the yardstick's norm; None is off.
      peak_limit: Times the yardstick's largest coordinate; None is off.
      norm_clip: Longer updates are scaled down to this many times the yardstick's norm; None is
        off. It changes honest runs, as any useful value clips some honest updates.
      strikes: Hostile replies in a row after which a client is put into quarantine; 0 is never.
        Errors, lost replies and dropped updates are bad luck, and do not count.
      quarantine_rounds: For which it is not asked; one more hostile reply, and it is back.

    Reference:
      Sun et al. 2019, "Can you really backdoor federated learning?" (norm bounds).
    """

    group: ClassVar[str]
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    norm_limit: float | None = 20.0
    peak_limit: float | None = 50.0
    norm_clip: float | None = None
    strikes: int = 3
    quarantine_rounds: int = 10

    def __post_init__(self) -> None:
        for name in ("norm_limit", "peak_limit", "norm_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"guard.{name} must be positive, or null, not {value}")
        if self.strikes < 0:
            raise ConfigError(
                f"guard.strikes must be at least 1, or 0 for never, not {self.strikes}"
            )
        if self.quarantine_rounds < 1:
            raise ConfigError(
                f"guard.quarantine_rounds must be at least 1, not {self.quarantine_rounds}"
            )

    def watch(self, before: GuardState, server_round: int, model: Vector) -> Watch:
        """Return the guard of one round; ``model`` is (d,), the global one."""
        empty = np.zeros(0, np.float32)
        yardstick = _median(before.medians) if before.medians else Size.of(model, empty)
        return Watch(self, before, server_round, yardstick)


class Watch:
    """One round under guard.

    Attributes:
      barred: Nodes that are not to be asked.
    """

    def __init__(self, guard: Guard, before: GuardState, server_round: int, unit: Size) -> None:
        self._guard, self._before, self._round, self._unit = guard, before, server_round, unit
        self._sizes: list[Size] = []
        self._struck: dict[int, bool] = {}
        self._registered = dict(before.registered)
        self.barred = before.barred_in(server_round)

    def admit(self, delta: Vector, state: Vector) -> Vector:
        """Return a decoded delta as it counts; safe in several threads.

        Raises:
          RejectedError: If it is out of proportion.
        """
        size, unit, guard = Size.of(delta, state), self._unit, self._guard
        self._sizes.append(size)  # atomic; only the median of all is used
        for kind, limit, value, usual in (
            ("norm", guard.norm_limit, size.norm, unit.norm),
            ("peak", guard.peak_limit, size.peak, unit.peak),
            ("peak", guard.peak_limit, size.state, unit.state),
        ):
            if limit is not None and usual > 0 and value > limit * usual:
                raise RejectedError(kind, f"{value:.3g} is more than {limit:g} times {usual:.3g}")
        if guard.norm_clip is not None and 0 < guard.norm_clip * unit.norm < size.norm:
            return delta * np.float32(guard.norm_clip * unit.norm / size.norm)
        return delta

    def registered(self, client: int, examples: int) -> int:
        """Return the examples that count for a client's claim: at most what it first claimed."""
        return min(examples, self._registered.setdefault(client, examples))

    def note(self, node: int, kind: str | None = None) -> None:
        """Note a node's reply: accepted (None), or what it was rejected as; the worst decides."""
        if kind is None:
            self._struck.setdefault(node, False)
        elif kind in HOSTILE:
            self._struck[node] = True

    def after(self) -> GuardState:
        """Return what the guard remembers after the round."""
        medians = self._before.medians
        if self._sizes:
            medians = (*medians, _median(self._sizes))[-MEMORY:]
        strikes = dict(self._before.strikes)
        barred = {node: self._before.barred[node] for node in self.barred}
        for node, struck in sorted(self._struck.items()):
            if not struck:
                strikes.pop(node, None)
                continue
            strikes[node] = strikes.get(node, 0) + 1
            if 0 < self._guard.strikes <= strikes[node]:
                barred[node] = self._round + self._guard.quarantine_rounds
        return GuardState(medians, strikes, barred, self._registered)


def limit_memory(gigabytes: float) -> None:
    """Limit what this process may allocate, in GB of 10**9 bytes; the rest is a MemoryError.

    For a server process: Flower builds a client's arrays before any of our code sees them, and a
    megabyte on the wire may name itself a thousand times. :class:`fedq.engines.stream.StreamGrid`
    turns the error into one lost reply.

    Raises:
      FedqError: Where the system does not let a process limit itself.
    """
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9), hard))
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise FedqError(f"cannot limit memory to {gigabytes} GB here: {error}") from error
