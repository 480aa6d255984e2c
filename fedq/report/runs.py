"""Run directories as values: what a table or a plot says about one run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedq import manifest, registry, results
from fedq.errors import ConfigError, FedqError
from fedq.metrics import ACCURACY, Metric, metric_of
from fedq.results import BASELINE

#: Groups that change what is learnt or sent: a float run has none of them.
_OTHER = ("quantization", "privacy", "secure_aggregation", "attack", "pruning")
#: "Equal" is what is worth this part of the float run's final score, if both runs reach it.
EQUAL_PART = 0.99
#: What a run spends: sums over rounds of these keys of ``rounds.jsonl``.
COSTS: dict[str, tuple[str, ...]] = {
    "total_bytes": ("uplink_bytes", "downlink_bytes"),
    "uplink_bytes": ("uplink_bytes",),
    "downlink_bytes": ("downlink_bytes",),
    "wire_bytes": ("wire_uplink_bytes", "wire_downlink_bytes"),
    "simulated_seconds": ("simulated_seconds",),
    "joules": ("joules",),
}


@dataclass(frozen=True)
class Run:
    """One run as its directory tells it; an interrupted one has no summary.

    Attributes:
      path: The run directory.
      config: ``config.yaml``.
      rounds: ``rounds.jsonl``, in order; round 0 is the evaluation before training.
      summary: ``summary.json``, empty if the run has not ended.
      manifest: ``manifest.json``, empty if there is none.
      metered_bytes: What ``wire.json`` says that links carried, None if nobody counted.
    """

    path: Path
    config: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    metered_bytes: int | None = None

    @cached_property
    def compared_with(self) -> frozenset[Path]:
        """Where its float run may be: itself, below it, and where its manifest says."""
        places = [Path(), Path(BASELINE), Path(self.manifest.get("baseline") or BASELINE)]
        return frozenset((self.path / place).resolve() for place in places)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @property
    def name(self) -> str:
        """The run's own label; several runs may share one, see :func:`labels`."""
        fallback = "float_baseline" if self.path.name == BASELINE else self.path.name
        return str(self.summary.get("name") or self.config.get("name") or fallback)

    @property
    def codec(self) -> str:
        """What encodes the uplink, and its options that differ from its defaults, in one line.

        Secure aggregation sends integers of its own. Of a pruned model also how much is zero.
        """
        group, choice = "secure_aggregation", self.config.get("secure_aggregation")
        if _name(choice) in (None, "none"):
            group, choice = "codec", self.config.get("codec")
        name = registry.describe(choice, group) if choice else str(self.summary.get("codec", ""))
        zeros = number(self.summary.get("sparsity"))
        return f"{name}, {zeros:.0%} pruned" if zeros else name

    @cached_property
    def is_float(self) -> bool:
        """Whether it is plain FedAvg with float32 messages: what the others are compared with."""
        wire = {_name(self.config.get(key)) for key in ("codec", "downlink")}
        plain = all(_name(self.config.get(key)) in (None, "none") for key in _OTHER)
        return (wire == {"identity"} and plain) or self.name == "float_baseline"

    @cached_property
    def metric(self) -> Metric:
        """What its models are judged by: accuracy, for a classification."""
        found = (metric_of(record) for record in (self.summary, *self.rounds))
        return next((metric for metric in found if metric), ACCURACY)

    @cached_property
    def place(self) -> Path:
        """Its directory, without links."""
        return self.path.resolve()

    @cached_property
    def task(self) -> str:
        """Data, partition and number of clients, as a key to compare."""
        keys = "data", "partition", "clients"
        return json.dumps([self.config.get(key) for key in keys], sort_keys=True)

    @property
    def seed(self) -> int | None:
        """The run's seed."""
        found = number(self.config.get("seed", self.summary.get("seed")))
        return None if found is None else int(found)

    @property
    def score(self) -> float | None:
        """The metric of the deployed model at the end, on the test set; accuracy in [0, 1]."""
        return self._final(self.metric.name)

    @property
    def float_score(self) -> float | None:
        """The metric of its float twin."""
        return self._final(self.metric.float_name)

    @property
    def done(self) -> int:
        """Rounds of training that ended."""
        return int(self.rounds[-1]["round"] if self.rounds else self.summary.get("rounds", 0))

    @property
    def planned(self) -> int:
        """Rounds of training asked for."""
        return int(self.config.get("rounds") or self.summary.get("rounds") or self.done)

    @property
    def uplink_bytes(self) -> int:
        """Bytes from clients to server, all rounds."""
        return self._total("uplink_bytes")

    @property
    def downlink_bytes(self) -> int:
        """Bytes from server to clients, all rounds."""
        return self._total("downlink_bytes")

    @property
    def total_bytes(self) -> int:
        """Bytes in both directions, all rounds."""
        return self.uplink_bytes + self.downlink_bytes

    @property
    def wire_bytes(self) -> float | None:
        """Bytes on the wire, with headers and repetitions, if they were counted or simulated."""
        if self.metered_bytes is not None:
            return self.metered_bytes
        parts = [self.spent(key) for key in COSTS["wire_bytes"]]
        known = [part for part in parts if part is not None]
        return sum(known) if known else None

    @property
    def float32_bytes(self) -> int:
        """Bytes that the same messages would have taken as float32, both directions."""
        return self._total("float32_uplink_bytes") + self._total("float32_downlink_bytes")

    @property
    def uplink_bits(self) -> float | None:
        """Bits per parameter of a client's update."""
        return self._bits("uplink")

    @property
    def downlink_bits(self) -> float | None:
        """Bits per parameter of the model that a client receives."""
        return self._bits("downlink")

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of the run."""
        if "seconds" in self.summary:
            return number(self.summary["seconds"])
        times = [number(record.get("seconds")) for record in self.rounds]
        return sum(time for time in times if time is not None) if any(times) else None

    @cached_property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """(bytes so far in both directions, score of the deployed model) per evaluated round.

        Round 0 is left out: it has cost nothing and has no place on a logarithmic axis.
        """
        points, total = [], 0.0
        for record in self.rounds:
            total += number(record.get("uplink_bytes")) or 0
            total += number(record.get("downlink_bytes")) or 0
            score = number(record.get(self.metric.name))
            if score is not None and total > 0:
                points.append((total, score))
        return tuple(points)

    @cached_property
    def costs(self) -> dict[str, list[float]]:
        """Round, score and what was spent so far, at each evaluated round of training.

        Keys are ``round``, ``score`` and those of :data:`COSTS` that the rounds tell of.
        """
        told = {
            name: keys
            for name, keys in COSTS.items()
            if any(number(record.get(key)) for record in self.rounds for key in keys)
        }
        sums = dict.fromkeys(told, 0.0)
        found: dict[str, list[float]] = {name: [] for name in ("round", "score", *told)}
        for record in self.rounds:
            for name, keys in told.items():
                sums[name] += sum(number(record.get(key)) or 0.0 for key in keys)
            score = number(record.get(self.metric.name))
            if score is not None and record["round"] > 0:
                found["round"].append(record["round"])
                found["score"].append(score)
                for name, value in sums.items():
                    found[name].append(value)
        return found

    def spent(self, key: str) -> float | None:
        """Return the sum of a key over all rounds; None if no round has it."""
        values = [number(record.get(key)) for record in self.rounds]
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    def bytes_to_reach(self, level: float) -> float | None:
        """Return the bytes spent when a round first ended as good as ``level``, else None."""
        reached = self.metric.reached
        return next((total for total, score in self.curve if reached(score, level)), None)

    def _final(self, key: str) -> float | None:
        found = number(self.summary.get(key))
        if found is not None:
            return found
        seen = [number(record.get(key)) for record in self.rounds]
        return next((value for value in reversed(seen) if value is not None), None)

    def _total(self, key: str) -> int:
        found = number(self.summary.get(key))
        if found is None:
            found = sum(number(record.get(key)) or 0 for record in self.rounds)
        return int(found)

    def _bits(self, direction: str) -> float | None:
        found = number(self.summary.get(f"{direction}_bits_per_parameter"))
        if found is None and (whole := self._total(f"float32_{direction}_bytes")):
            found = 32 * self._total(f"{direction}_bytes") / whole
        return found


@dataclass(frozen=True)
class EqualAccuracy:
    """What two runs spent until each first reached the same score."""

    level: float
    run_bytes: float
    float_bytes: float

    @property
    def ratio(self) -> float:
        """How many times fewer bytes the run took than the float run."""
        return self.float_bytes / self.run_bytes


def equal_accuracy(run: Run, reference: Run) -> EqualAccuracy | None:
    """Compare bytes at 99 % of the reference's final score, or the best that both reached."""
    metric = run.metric
    if not run.curve or not reference.curve or reference.score is None:
        return None
    if reference.metric is not metric:
        return None
    tops = [metric.best(score for _, score in r.curve) for r in (run, reference)]
    level = metric.worst([metric.part(reference.score, EQUAL_PART), *tops])
    ours, theirs = run.bytes_to_reach(level), reference.bytes_to_reach(level)
    return EqualAccuracy(level, ours, theirs) if ours and theirs else None


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read one run directory; an interrupted run is fine, one without a single round is not.

    Raises:
      ConfigError: If ``path`` is no run directory or has no results yet.
      FedqError: If its files are damaged.
    """
    path = Path(path)
    config = results.read_config(path)
    rounds, summary = results.read_rounds(path), results.read_summary(path)
    if not rounds and not summary:
        raise ConfigError(f"{path} has no results yet: wait until its first round has ended")
    try:
        origin = manifest.read(path)
    except FedqError:  # results count without it
        origin = None
    wire = results.read_wire(path)
    return Run(path, config, tuple(rounds), summary or {}, origin or {}, wire)


@dataclass(frozen=True)
class Findings:
    """What was found below some paths.

    Attributes:
      runs: Runs with results, each followed by its own float baseline.
      left_out: Directories of which nothing can be shown, with the reason.
    """

    runs: Sequence[Run]
    left_out: Mapping[Path, str]


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read runs, each followed by its float baseline, and the runs inside of sweep directories.

    Raises:
      ConfigError: If a path holds no run.
      FedqError: If the files of a run that was named are damaged.
    """
    return list(survey(paths).runs)


def survey(paths: Iterable[str | os.PathLike[str]]) -> Findings:
    """Read runs as :func:`find_runs` does, and say which runs of a sweep cannot be read.

    Raises:
      ConfigError: If a path holds no run.
      FedqError: If the files of a run that was named are damaged.
    """
    found: dict[Path, Run] = {}
    left_out: dict[Path, str] = {}
    for path in map(Path, paths):
        inside = _with_baseline(path) if results.holds_config(path) else list(_below(path))
        if not inside:
            found[path.resolve()] = load_run(path)  # says what is wrong with it
        for directory in inside:
            try:
                found.setdefault(directory.resolve(), load_run(directory))
            except FedqError as error:
                if directory == path:
                    raise
                left_out[directory] = str(error)
    if not found:
        path, reason = next(iter(left_out.items()))
        raise FedqError(f"no run can be shown: {reason} ({path})")
    return Findings(list(found.values()), left_out)


def _below(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Yield the runs in a folder of runs or sweeps, those with numbers in their order."""
    if not folder.is_dir():
        return
    for child in sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name)):
        if results.holds_config(child):
            yield from _with_baseline(child)
        elif depth > 1 and child.is_dir() and not child.is_symlink():
            yield from _below(child, depth - 1)


def _with_baseline(path: Path) -> list[Path]:
    baseline = path / BASELINE
    known = any((baseline / name).exists() for name in (results.ROUNDS, results.SUMMARY))
    return [path, baseline] if known else [path]


def references(runs: Sequence[Run]) -> list[Run | None]:
    """Return the float run that each run is compared with.

    That is its own baseline, else the first of the same task and seed, or of the same task, or any.
    """
    floats = [run for run in runs if run.is_float or run.path.name == BASELINE]
    first: dict[Any, Run] = {}
    for run in floats:
        for key in (run.place, (run.task, run.seed), run.task):
            first.setdefault(key, run)
    found = []
    for run in runs:
        own = [first[place] for place in run.compared_with if place in first]
        known = (first.get(key) for key in ((run.task, run.seed), run.task))
        found.append(next((r for r in (*own, *known, *floats[:1]) if r is not None), None))
    return found


def labels(runs: Sequence[Run]) -> list[str]:
    """Return one distinct label per run: names where they differ, else paths below the runs."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else places(runs)


def places(runs: Sequence[Run]) -> list[str]:
    """Return the path of each run below the directory that holds all of them."""
    root = Path(os.path.commonpath([run.place.parent for run in runs]))
    return [run.place.relative_to(root).as_posix() for run in runs]


def number(value: object) -> float | None:
    """Return a finite number that a file holds, None if it is something else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _name(choice: object) -> Any:
    """Return the name of a choice in a configuration."""
    return choice.get("name") if isinstance(choice, Mapping) else choice
