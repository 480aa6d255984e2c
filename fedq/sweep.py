"""A sweep: many runs in one directory, several at a time, which goes on where it was left.

::

    DIR/1/ DIR/2/ ...       a run each: a cell
    DIR/baselines/1/ ...    the float runs that cells are compared with, each once
    DIR/N/manifest.json     which configuration the cell is, and which baseline is its own
    DIR/N/log.txt           warnings of the run

There is no file of the sweep as a whole: its cells are the directories with a manifest. A cell is
found again by its configuration, so that the same sweep goes on, and a larger one grows.

Cells run in processes forked from one that has imported everything, and has loaded the kernels of
their codecs and the data that they share: a cell starts in milliseconds. Cells times workers never
exceed the cores. As results do not depend on workers, many cells with one worker each are the
fastest way through a grid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedq import config, manifest, progress, simulation
from fedq.data.base import load
from fedq.errors import ConfigError, FedqError
from fedq.experiment import Experiment
from fedq.layout import Layout
from fedq.results import BASELINES, holds_run, locked
from fedq.server import Observer
from fedq.threads import usable_cores

LOG_FILE = "log.txt"
#: Seconds between two looks at the clock while nothing happens.
TICK_S = 0.25
#: Seconds that interrupted cells get to put their workers away.
GRACE_S = 20.0


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      path: Its run directory.
      label: The options in which it differs from other cells.
      experiment: What it runs.
      overrides: What makes it of the plain configuration.
    """

    path: Path
    label: str
    experiment: Experiment
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a cell ended: its summary, or why it has none."""

    cell: Cell
    summary: Mapping[str, Any] | None = None
    error: str | None = None


class Display(Protocol):
    """Shows a sweep's progress; see :func:`fedq.progress.cells`."""

    def started(self, cell: Cell) -> None:
        """A cell's process runs."""

    def record(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """A cell has ended a round."""

    def ended(self, end: Ended) -> None:
        """A cell has come to its end."""

    def tick(self) -> None:
        """Time has passed."""


# --- which cells ---------------------------------------------------------------------------------


def plan(base: Path, requests: Sequence[Sequence[str]]) -> list[Cell]:
    """Give every request for a run its cell in ``base``, and write their manifests.

    A configuration that has a cell keeps it. Float baselines are cells of their own, one for all
    requests that share it, and come first.

    Args:
      base: The sweep's directory; made if there is none.
      requests: Overrides of each run.

    Raises:
      ConfigError: If ``base`` is itself a run; on overrides that make no experiment.
    """
    if holds_run(base):
        raise ConfigError(f"{base} holds a single run; choose another run_dir for the sweep")
    experiments = [simulation.anchored(config.load(request)) for request in requests]
    known = {found["config_sha256"]: path for path, found in manifests(base)}
    places = _Places(base, known)
    labels = distinct(requests)
    cells: dict[Path, Cell] = {}
    floats: dict[Path, list[str]] = {}
    # Cells first: one of them may be the baseline of another.
    paths = [places.of(experiment, base) for experiment in experiments]
    for experiment, request, label, path in zip(experiments, requests, labels, paths, strict=True):
        beside = config.baseline_of(experiment) if experiment.baseline else None
        pointer = None
        if beside is not None:
            where = places.of(beside, base / BASELINES)
            pointer = os.path.relpath(where, path)
            if where not in paths:
                floats.setdefault(where, []).append(label)
                cells.setdefault(where, Cell(where, beside.name, beside))
        _note(path, experiment, request, pointer)
        cells[path] = Cell(path, label, experiment, tuple(request))
    for where, users in floats.items():
        shared = _common(users) if len(floats) > 1 else ""
        experiment = cells[where].experiment
        _note(where, experiment, shared.split(), None)
        label = f"{experiment.name} {shared}".strip()
        cells[where] = dataclasses.replace(cells[where], label=label)
    return sorted(cells.values(), key=lambda cell: cell.path not in floats)


def planned(base: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of an earlier sweep, with the few options that may still change.

    Raises:
      ConfigError: If ``base`` holds no sweep.
    """
    found = list(manifests(base))
    if not found:
        raise ConfigError(f"{base} holds no sweep; give the directory that a sweep's run_dir was")
    changed = {text.partition("=")[0] for text in overrides}
    requests = [
        [text for text in entry["overrides"] if text.partition("=")[0] not in changed]
        + ([] if path.parent.name == BASELINES else list(overrides))
        for path, entry in found
    ]
    cells = []
    for (path, entry), request, label in zip(found, requests, distinct(requests), strict=True):
        experiment = config.load_resumed(entry["config"], overrides)
        if overrides:
            _note(path, experiment, request, entry["baseline"])
        is_float = path.parent.name == BASELINES
        name = f"{experiment.name} {label}".strip() if is_float else label
        cells.append(Cell(path, name, experiment, tuple(request)))
    return cells


def holds_sweep(base: Path) -> bool:
    """Whether a directory is that of a sweep, not of a single run."""
    return not holds_run(base) and any(manifests(base))


def manifests(base: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the baselines and cells of a sweep; what is damaged is left alone."""
    for folder in (base / BASELINES, base):
        numbered = folder.iterdir() if folder.is_dir() else ()
        for path in sorted((p for p in numbered if p.name.isdecimal()), key=lambda p: int(p.name)):
            with contextlib.suppress(FedqError):
                found = manifest.read(path)
                if found is not None:
                    yield path, found


@dataclass
class _Places:
    """Gives configurations their directories."""

    base: Path
    known: dict[str, Path]

    def of(self, experiment: Experiment, folder: Path) -> Path:
        key = manifest.fingerprint(experiment.to_config())
        if key not in self.known:
            numbers = [int(p.name) for p in folder.glob("*") if p.name.isdecimal()]
            numbers += [int(p.name) for p in self.known.values() if p.parent == folder]
            self.known[key] = folder / str(max(numbers, default=0) + 1)
        return self.known[key]


def _note(
    path: Path, experiment: Experiment, overrides: Sequence[str], baseline: str | None
) -> None:
    """Write a cell's manifest, unless it says so already."""
    settings = experiment.to_config()
    with contextlib.suppress(FedqError):  # a damaged one is replaced
        found = manifest.read(path)
        if found is not None:
            wanted = manifest.fingerprint(settings), baseline, list(overrides)
            if wanted == (found["config_sha256"], found["baseline"], found["overrides"]):
                return
            manifest.write(path, settings, overrides, baseline, found["sessions"])
            return
    manifest.write(path, settings, overrides, baseline)


def distinct(requests: Sequence[Sequence[str]]) -> list[str]:
    """Return a label of each request: the overrides that not all of them have.

    >>> distinct([["rounds=2", "seed=0"], ["rounds=2", "seed=1"]])
    ['seed=0', 'seed=1']
    """
    shared = set.intersection(*map(set, requests)) if len(requests) > 1 else set()
    return [" ".join(text for text in request if text not in shared) for request in requests]


def _common(labels: Iterable[str]) -> str:
    """Return the words that all labels have, in their order."""
    first, *others = [label.split() for label in labels]
    return " ".join(word for word in first if all(word in other for other in others))


# --- how they run --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How a machine is divided: this many cells at a time, each with so many workers."""

    jobs: int
    workers: int


def share(experiments: Sequence[Experiment], jobs: int | None, cores: int) -> Share:
    """Divide the cores among cells.

    Args:
      experiments: What runs.
      jobs: Cells at a time that were asked for; None is as many as there is room for.
      cores: Of this machine.

    Raises:
      ConfigError: If ``jobs`` and ``engine.workers`` ask for more than there is.
    """
    widest = max([_workers(experiment) for experiment in experiments], default=0)
    if jobs is None:
        jobs = max(1, min(cores // max(widest, 1), len(experiments)))
    elif jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {jobs}")
    elif jobs > 1 and jobs * max(widest, 1) > cores:
        raise ConfigError(
            f"{jobs} jobs with {max(widest, 1)} workers each are more than the {cores} cores of "
            "this machine; choose fewer"
        )
    return Share(jobs, max(1, cores // jobs))


def _workers(experiment: Experiment) -> int:
    return int(getattr(experiment.engine, "workers", 0))


def _fitted(experiment: Experiment, workers: int) -> Experiment:
    """Return the experiment with the workers and threads that it may have, unless it says."""
    if hasattr(experiment.engine, "workers") and not experiment.engine.workers:
        engine = dataclasses.replace(experiment.engine, workers=workers)
        experiment = experiment.replace(engine=engine)
    return experiment.replace(decode_threads=experiment.decode_threads or min(workers, 4))


def run(
    base: Path, cells: Sequence[Cell], display: Display, *, jobs: int | None = None
) -> list[Ended]:
    """Run the cells that have not ended yet, several at a time; return how all ended.

    A cell that fails or dies costs nothing but itself.

    Args:
      base: The sweep's directory, locked meanwhile.
      cells: What to run, in this order.
      display: Shows progress.
      jobs: Cells at a time; None is as many as the cores allow.

    Raises:
      ConfigError: If another process runs this sweep.
      KeyboardInterrupt: On Ctrl-C or SIGTERM, when all cells have stopped.
    """
    ended: list[Ended] = []
    with locked(base):
        todo: deque[Cell] = deque()
        for cell in cells:
            try:
                outcome = simulation.finished(cell.experiment, cell.path)
            except FedqError as error:
                ended.append(Ended(cell, error=str(error)))
                display.ended(ended[-1])
                continue
            if outcome is None:
                todo.append(cell)
            else:
                ended.append(Ended(cell, outcome.summary))
                display.ended(ended[-1])
        division = share([cell.experiment for cell in todo], jobs, usable_cores())
        _prepare([cell.experiment for cell in todo])
        running: list[_Running] = []
        try:
            while todo or running:
                while todo and len(running) < division.jobs:
                    running.append(_start(todo.popleft(), division.workers))
                    display.started(running[-1].cell)
                for one in _listen(running, display):
                    running.remove(one)
                    ended.append(one.end())
                    display.ended(ended[-1])
        finally:
            _stop(running)
    return ended


def _prepare(experiments: Sequence[Experiment]) -> None:
    """Do once what each cell would do for itself; what fails here is for the cell to report.

    Plug-ins are left to the cells: one that kills its process must not end the sweep.
    """
    manifest.provenance()
    experiments = [experiment for experiment in experiments if not experiment.plugins]
    data = {experiment.data for experiment in experiments}
    with contextlib.suppress(Exception):
        if len(data) == 1:  # several would stay in memory for as long as the sweep lasts
            load(data.pop())
    layout = Layout.flat(64)
    for codec in {codec for one in experiments for codec in (one.codec, one.downlink)}:
        # The first kernel takes a second: Numba sets itself up, and compiles what is not on disk.
        with contextlib.suppress(Exception):
            codec.decode(codec.encode(np.ones(64, np.float32), layout, 0), layout)


@dataclass
class _Running:
    cell: Cell
    process: BaseProcess
    pipe: Connection
    said: dict[str, Any] = field(default_factory=dict)

    def end(self) -> Ended:
        """Return how the process ended, which it has."""
        self.process.join()
        self.pipe.close()
        if self.said:
            return Ended(self.cell, **self.said)
        code = self.process.exitcode or 0
        why = f"signal {-code}" if code < 0 else f"exit status {code}"
        if code == -signal.SIGKILL:
            why += ", perhaps for want of memory: fewer --jobs need less"
        return Ended(self.cell, error=f"its process died ({why})")


def _start(cell: Cell, workers: int) -> _Running:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(cell, workers, there, here)
    )
    process.start()
    there.close()
    return _Running(cell, process, here)


def _listen(running: Sequence[_Running], display: Display) -> Iterator[_Running]:
    """Pass on what cells say; yield those that have ended."""
    sources: list[Connection | int] = [one.pipe for one in running]
    sources += [one.process.sentinel for one in running]
    ready = wait(sources, TICK_S)
    for one in list(running):
        over = one.process.sentinel in ready  # before the pipe is read: nothing is said after it
        with contextlib.suppress(EOFError, OSError):
            while one.pipe.poll():
                kind, content = one.pipe.recv()
                if kind == "record":
                    display.record(one.cell, content)
                else:
                    one.said[kind] = content
        if over:
            yield one
    display.tick()


def _stop(running: Sequence[_Running]) -> None:
    """Interrupt cells, and wait: each has its last round on disk."""
    for one in running:
        one.process.terminate()
    try:
        for one in running:
            one.process.join(GRACE_S)
    finally:  # also at a second Ctrl-C
        for one in running:
            one.process.kill()
            one.process.join()
            one.pipe.close()


class _OrphanedError(Exception):
    """The sweep is gone; a run that goes on would keep the next one from its directory."""


def _work(cell: Cell, workers: int, pipe: Connection, parents: Connection) -> None:
    """The life of a cell's process."""
    parents.close()
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to handle
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = (cell.path / LOG_FILE).open("a", encoding="utf-8", buffering=1)
    for stream in (1, 2):  # standard output and error, of libraries too
        os.dup2(log.fileno(), stream)
    progress.log_to_file(log)

    @contextlib.contextmanager
    def watch(experiment: Experiment) -> Iterator[Observer]:
        def observe(record: Mapping[str, Any]) -> None:
            if os.getppid() != parent:
                raise _OrphanedError
            if not record.get("resumed"):
                progress.warn_of_losses(record)
            pipe.send(("record", dict(record)))

        yield observe

    try:
        begun = holds_run(cell.path)
        outcome = simulation.run_experiment(
            _fitted(cell.experiment, workers),
            cell.path,
            resume=begun,
            watch=watch,
            overrides=cell.overrides,
        )
        pipe.send(("summary", outcome.summary))
    except (KeyboardInterrupt, _OrphanedError, BrokenPipeError):
        os._exit(1)
    except FedqError as error:
        pipe.send(("error", str(error)))
    except Exception as error:
        traceback.print_exc(file=log)
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        pipe.send(("error", f"{text} (details in {cell.path / LOG_FILE})"))
