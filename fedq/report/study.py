"""A study: runs that differ in their seed alone are one method; methods of one task are compared.

A *task* is data and partition. Within a task, each method has the mean and the 95 % interval of its
seeds (Student's t), and its difference from a reference, paired by seed: run ``s`` of one method
and run ``s`` of the other began from the same model, with the same clients in every round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedq import manifest, registry
from fedq.errors import ConfigError
from fedq.metrics import ACCURACY, Metric
from fedq.report.runs import COSTS, EQUAL_PART, Run, number, places, references

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; ``half`` is None for a single value.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half, 6), found.n
    (2.0, 2.484138, 3)
    """

    mean: float
    half: float | None
    n: int


def interval(values: Sequence[float]) -> Interval | None:
    """Return mean and half width ``t_{0.975, n-1} s / sqrt(n)``; None of no values."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    from scipy.special import stdtrit

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Interval(mean, quantile * deviation / math.sqrt(n), n)


@dataclass(frozen=True)
class Paired:
    """A difference paired by seed: its interval, and the two-sided p of Student's t test."""

    difference: Interval
    p: float | None


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Paired | None:
    """Compare two methods over the seeds that both have; None if they share none.

    >>> round(paired({0: 0.95, 1: 0.96, 2: 0.97}, {0: 0.94, 1: 0.94, 2: 0.96}).p, 6)
    0.057191
    """
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    found = interval(differences)
    if found is None:
        return None
    if found.half is None:
        return Paired(found, None)
    if len(set(differences)) == 1:  # no deviation: certain, or nothing to see
        return Paired(found, 1.0 if found.mean == 0 else 0.0)
    from scipy.special import stdtr, stdtrit

    n = found.n
    error = found.half / float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Paired(found, 2 * float(stdtr(n - 1, -abs(found.mean) / error)))


@dataclass(frozen=True, eq=False)
class Method:
    """Runs that differ in their seed alone.

    Attributes:
      label: Distinct within the task.
      task: What it was run on.
      runs: One per seed.
      is_reference: Whether the others of the task are compared with it.
    """

    label: str
    task: str
    runs: tuple[Run, ...]
    is_reference: bool = False

    @cached_property
    def metric(self) -> Metric:
        """What it is judged by."""
        return next((run.metric for run in self.runs if run.score is not None), ACCURACY)

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that count: those that came to their end, or all if none did."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    def by_seed(self, figure: str) -> dict[Any, float]:
        """Return a figure of each run that has it."""
        values = {seed: found[figure] for seed, found in self._figures.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    @cached_property
    def _figures(self) -> dict[Any, dict[str, float | None]]:
        return {run.seed: figures(run) for run in self.finished}

    def mean(self, figure: str) -> Interval | None:
        """Return a figure's mean and interval over the seeds that have it."""
        return interval(list(self.by_seed(figure).values()))

    @cached_property
    def curve(self) -> dict[str, list[float]]:
        """Mean score, its half width, and mean costs so far, per evaluated round of all seeds.

        Keys are ``round``, ``score``, ``half`` and those costs that all runs have.
        """
        curves = [run.costs for run in self.finished]
        common = sorted(set.intersection(*(set(curve["round"]) for curve in curves)))
        keys = [key for key in curves[0] if all(key in curve for curve in curves)]
        found: dict[str, list[float]] = {key: [] for key in [*keys, "half"]}
        places = [{value: i for i, value in enumerate(curve["round"])} for curve in curves]
        for round_ in common:
            for key in keys:
                values = [
                    curve[key][place[round_]] for curve, place in zip(curves, places, strict=True)
                ]
                mean = interval(values)
                assert mean is not None
                found[key].append(mean.mean)
                if key == "score":
                    found["half"].append(mean.half or 0.0)
        return found


def figures(run: Run) -> dict[str, float | None]:
    """Return a run's final figures: scores (accuracies in [0, 1]), bytes, seconds, joules."""
    return {
        "score": run.score,
        "float_score": run.float_score,
        "uplink_bytes": run.uplink_bytes,
        "downlink_bytes": run.downlink_bytes,
        "total_bytes": run.total_bytes,
        "wire_bytes": run.wire_bytes,
        "uplink_bits": run.uplink_bits,
        "downlink_bits": run.downlink_bits,
        "simulated_seconds": run.spent("simulated_seconds"),
        "joules": run.spent("joules"),
        "seconds": run.seconds,
        "weight_bytes": number(run.summary.get("weight_bytes")),
        "zero_weights": number(run.summary.get("zero_weights")),
    }


@dataclass(frozen=True)
class Study:
    """The methods of some runs, task by task, best first."""

    methods: tuple[Method, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], reference: str | None = None) -> Study:
        """Group runs; of several of one configuration and seed the first finished one counts.

        Args:
          runs: All runs.
          reference: Label of the method that others are compared with; by default a float one.

        Raises:
          ConfigError: If no method has the label.
        """
        alike: dict[str, dict[Any, Run]] = {}
        for run in runs:
            config = {key: value for key, value in run.config.items() if key != "seed"}
            group = alike.setdefault(manifest.fingerprint(config), {})
            earlier = group.get(run.seed)
            if earlier is None or (run.finished and not earlier.finished):
                group[run.seed] = run
        groups = [tuple(group.values()) for group in alike.values()]
        tasks = _tasks(groups)
        names = _names(groups, tasks)
        methods = [Method(*each) for each in zip(names, tasks, groups, strict=True)]
        methods = [_referred(m, methods, reference) for m in methods]
        if reference is not None and not any(method.is_reference for method in methods):
            known = ", ".join(dict.fromkeys(names))
            raise ConfigError(f"no method is called '{reference}'; there are: {known}")
        order = list(dict.fromkeys(tasks))
        methods.sort(key=lambda m: (order.index(m.task), loss(m)))
        return cls(tuple(methods))

    @cached_property
    def tasks(self) -> dict[str, list[Method]]:
        """The methods of each task, best score first."""
        found: dict[str, list[Method]] = {}
        for method in self.methods:
            found.setdefault(method.task, []).append(method)
        return found

    @cached_property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for method in self.methods for run in method.runs]

    def metric(self, task: str) -> Metric:
        """Return what the methods of a task are judged by; those without a score do not count."""
        known = (m.metric for m in self.tasks[task] if m.mean("score") is not None)
        return next(known, ACCURACY)

    def reference(self, method: Method) -> Method | None:
        """Return what a method is compared with."""
        return next((m for m in self.tasks[method.task] if m.is_reference), None)

    def against(self, method: Method, figure: str = "score") -> Paired | None:
        """Return a method's difference from its reference, paired by seed."""
        other = self.reference(method)
        if other is None or other is method:
            return None
        return paired(method.by_seed(figure), other.by_seed(figure))

    def front(self, task: str, cost: str) -> list[Method]:
        """Return a task's Pareto front: no other method has a better score for as little cost."""
        return self._fronts[task, cost]

    def on_front(self, method: Method, cost: str) -> bool:
        """Whether a method is on its task's Pareto front."""
        return method in self._fronts[method.task, cost]

    def prominent(self, task: str, most: int) -> list[Method]:
        """Return the methods to name first: the reference, the front (or samples of it), the best.

        Args:
          task: Whose.
          most: How many there is room for.
        """
        chosen = [method for method in self.tasks[task] if method.is_reference]
        best_first = [m for m in self.front(task, "total_bytes")[::-1] if m not in chosen]
        room = max(1, most - len(chosen))
        if len(best_first) > room:
            last = len(best_first) - 1
            places = {round(i * last / max(1, room - 1)) for i in range(room)}
            best_first = [best_first[place] for place in sorted(places)]
        chosen += best_first
        chosen += [m for m in self.tasks[task] if m not in chosen]
        return chosen[:most]

    @cached_property
    def _fronts(self) -> dict[tuple[str, str], list[Method]]:
        return {
            (task, cost): front(self.tasks[task], cost) for task in self.tasks for cost in COSTS
        }

    @cached_property
    def _floats(self) -> dict[Path, Run | None]:
        return dict(zip((run.path for run in self.runs), references(self.runs), strict=True))

    def to_reach(self, method: Method, cost: str = "total_bytes") -> Reached:
        """Return what a method spent until each seed first was worth 99 % of its float run."""
        ours, theirs, missing = [], [], 0
        for run in method.finished:
            other = self._floats[run.path]
            if other is None or other.score is None or other.metric is not run.metric:
                continue
            level = run.metric.part(other.score, EQUAL_PART)
            mine, its = _spent(run, level, cost), _spent(other, level, cost)
            if mine is None or its is None:
                missing += 1
            else:
                ours.append(mine)
                theirs.append(its)
        return Reached(interval(ours), interval(theirs), len(ours), len(ours) + missing)


def front(methods: Sequence[Method], cost: str) -> list[Method]:
    """Return the methods that no other dominates: less cost and no worse a score, or vice versa."""
    points = []
    for method in methods:
        spent = method.mean(cost)
        if spent is not None and method.mean("score") is not None:
            points.append((spent.mean, loss(method), method))
    best, found = math.inf, []
    for _, lost, method in sorted(points, key=lambda point: point[:2]):
        if lost < best:
            best = lost
            found.append(method)
    return found


@dataclass(frozen=True)
class Reached:
    """What a method spent to be worth 99 % of the float run, and float itself.

    Attributes:
      spent: By the seeds that reached it.
      by_float: By the float runs of these seeds.
      reached: Seeds that did.
      of: Seeds that have a float run to compare with.
    """

    spent: Interval | None
    by_float: Interval | None
    reached: int
    of: int

    @property
    def ratio(self) -> float | None:
        """How many times less than float; None unless all seeds reached the level."""
        if self.spent is None or self.by_float is None or self.reached < self.of:
            return None
        return self.by_float.mean / self.spent.mean


def remarks(runs: Iterable[Run], study: Study | None = None) -> list[str]:
    """Return what a reader of the tables must know about single runs.

    Args:
      runs: All runs.
      study: What was made of them.
    """
    said = []
    versions: set[str] = set()
    counted = None if study is None else {run.place for run in study.runs}
    for run in runs:
        if counted is not None and run.place not in counted:
            said.append(f"{run.path}: left out, another run has its configuration and seed")
        elif not run.finished:
            said.append(f"{run.path}: unfinished, {run.done} of {run.planned} rounds")
        elif run.score is None:
            said.append(f"{run.path}: has no {run.metric.title}; another version of fedq wrote it")
        if run.finished:  # others do not say
            versions.add(str((run.summary.get("versions") or {}).get("fedq", "unknown")))
    if len(versions) > 1:
        said.append(f"runs of several versions of fedq: {', '.join(sorted(versions))}")
    return said


def _spent(run: Run, level: float, cost: str) -> float | None:
    curve = run.costs
    if cost not in curve:
        return None
    reached = zip(curve[cost], curve["score"], strict=True)
    return next((spent for spent, score in reached if run.metric.reached(score, level)), None)


def loss(method: Method) -> float:
    """Return a method's mean score as a number whose order is from best to worst."""
    mean = method.mean("score")
    return math.inf if mean is None else method.metric.loss(mean.mean)


def _referred(method: Method, methods: Sequence[Method], label: str | None) -> Method:
    """Mark the reference of a task: what was asked for, or its first float method."""
    own = [other for other in methods if other.task == method.task]
    if label is not None:
        chosen = [other for other in own if other.label == label]
    else:
        chosen = [other for other in own if other.runs[0].is_float]
    return replace(method, is_reference=chosen[:1] == [method])


def _tasks(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return each group's task: data, with partition and clients where one data set has several."""
    configs = [group[0].config for group in groups]
    data = [registry.describe(_placeless(config.get("data")), "data") for config in configs]
    parts = [registry.describe(config.get("partition"), "partition") for config in configs]
    clients = [f"{config.get('clients')} clients" for config in configs]
    several = [each for each in (parts, clients) if len(set(each)) > 1]
    return [", ".join(words) for words in zip(data, *several, strict=True)]


def _placeless(choice: Any) -> Any:
    """Return a choice of data with the name of its folder only."""
    if isinstance(choice, Mapping) and isinstance(choice.get("path"), str):
        return {**choice, "path": Path(choice["path"]).name}
    return choice


def _names(groups: Sequence[Sequence[Run]], tasks: Sequence[str]) -> list[str]:
    """Return labels that are distinct within each task: names, then overrides, then paths."""
    names = [group[0].name for group in groups]
    asked = [_asked(group[0]) for group in groups]
    paths = places([group[0] for group in groups])
    labels = list(names)
    for own in _alike(zip(tasks, names, strict=True)):
        shared = set.intersection(*(set(asked[i]) for i in own))
        for i in own:
            labels[i] = " ".join(word for word in asked[i] if word not in shared) or names[i]
    for own in _alike(zip(tasks, labels, strict=True)):
        for i in own:
            labels[i] = f"{labels[i]} ({paths[i]})"
    return labels


def _asked(run: Run) -> list[str]:
    """Return the overrides of a run that decide its result, but for the seed."""
    found = manifest.decisive(run.manifest.get("overrides", ()))
    return [text for text in found if not text.startswith("seed=")]


def _alike(keys: Iterable[tuple[str, str]]) -> list[list[int]]:
    """Return the places of each key that there are several of."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return [own for own in found.values() if len(own) > 1]
