"""What a tracker is: a copy of a run's rounds elsewhere. ``rounds.jsonl`` stays the truth."""

from __future__ import annotations

import abc
import contextlib
import importlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from fedq import registry
from fedq.errors import ConfigError

LOG = logging.getLogger("fedq")


class Tracker(abc.ABC):
    """A service that shows figures of runs; frozen, registered, chosen by ``trackers=[...]``.

    Where it keeps them is said by its own environment variables, as its users know them; without
    any, they go into the run directory.

    Attributes:
      extra: Of fedq, which installs it.
      module: That it needs.
    """

    group: ClassVar[str] = "tracker"
    name: ClassVar[str]
    extra: ClassVar[str]
    module: ClassVar[str]

    @abc.abstractmethod
    def open(self, path: Path, name: str, config: Mapping[str, Any]) -> Sink:
        """Return a sink for the run in ``path``; the same one again if the run goes on."""

    def check(self) -> None:
        """Raise a ConfigError if the service's package is not installed."""
        try:
            importlib.import_module(self.module)
        except ImportError:
            raise ConfigError(
                f"trackers=[{self.name}] needs another package; pip install 'fedq[{self.extra}]'"
            ) from None


class Sink(abc.ABC):
    """One run at a tracker."""

    @abc.abstractmethod
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send one round's figures."""

    @abc.abstractmethod
    def close(self, figures: Mapping[str, float]) -> None:
        """Send the final figures, which may be empty, and end."""


def figures(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of a round or a summary; nested ones by path.

    >>> figures({"round": 1, "accuracy": 0.5, "rejected": {"norm": 2}, "loss": None})
    {'round': 1.0, 'accuracy': 0.5, 'rejected/norm': 2.0}
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= figures(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{key}"] = float(value)
    return found


@contextlib.contextmanager
def tracking(
    names: Iterable[str], path: Path, name: str, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open trackers for a run, and yield what sends a record to all of them.

    A tracker that fails is left out with a warning; the run goes on. A record with ``resumed`` was
    sent by an earlier process. One without ``round`` is the summary.

    Args:
      names: Of registered trackers.
      path: The run directory.
      name: Of the run.
      config: Its ``config.yaml``.

    Raises:
      ConfigError: If a tracker is unknown or not installed.
    """
    trackers: list[Tracker] = [registry.build("tracker", tracker) for tracker in names]
    for tracker in trackers:
        tracker.check()
    sinks: dict[str, Sink] = {}

    def attempt(tracker: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # a service of others: whatever it is, the run is worth more
            sinks.pop(tracker, None)
            LOG.warning("%s is left out: %s: %s", tracker, type(error).__name__, error)
            return None

    for tracker in trackers:
        sink = attempt(tracker.name, partial(tracker.open, path, name, config))
        if sink is not None:
            sinks[tracker.name] = sink
    final: dict[str, float] = {}

    def send(record: Mapping[str, Any]) -> None:
        if record.get("resumed"):
            return
        if "round" not in record:
            final.update(figures(record))
            return
        step, numbers = int(record["round"]), figures(record)
        for key, sink in list(sinks.items()):
            attempt(key, partial(sink.log, step, numbers))

    try:
        yield send
    finally:
        for key, sink in list(sinks.items()):
            attempt(key, partial(sink.close, final))
