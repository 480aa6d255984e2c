"""What a run shows while it runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from fedq.metrics import ACCURACY, metric_of

if TYPE_CHECKING:  # the server brings torch
    from fedq.experiment import Experiment
    from fedq.server import Observer
    from fedq.sweep import Cell, Display, Ended

LOG = logging.getLogger("fedq")


def megabytes(count: int) -> str:
    """Return bytes in decimal units.

    >>> megabytes(1_234_567), megabytes(890), megabytes(45_600)
    ('1.23 MB', '890 B', '45.6 kB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


class _TimeLeft(ProgressColumn):
    """Time left by the mean of the rounds so far."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        done = int(task.completed) - int(task.fields.get("first", 0))
        if done < 1 or task.total is None or task.elapsed is None:
            return Text("-:--", style="progress.remaining")
        left = task.elapsed / done * (task.total - task.completed)
        return Text(f"{int(left) // 60}:{int(left) % 60:02d} left", style="progress.remaining")


class _Totals:
    """Running sums over a run's records."""

    def __init__(self) -> None:
        self.up = self.down = self.plain = 0
        self.seconds = self.joules = 0.0
        self.metric = ACCURACY
        self.score: float | None = None

    def add(self, record: Mapping[str, Any]) -> None:
        self.up += record["uplink_bytes"]
        self.down += record["downlink_bytes"]
        self.plain += record["float32_uplink_bytes"] + record["float32_downlink_bytes"]
        self.seconds += record.get("simulated_seconds") or 0.0
        self.joules += record.get("joules") or 0.0
        if metric := metric_of(record):
            self.metric, self.score = metric, record[metric.name]

    def text(self) -> str:
        score = f"{self.metric.title} {self.metric.text(self.score):>7}"
        sent = self.up + self.down
        # The float baseline is float32 but for the frames: no ratio to speak of.
        ratio = f", {self.plain / sent:.1f}x below float32" if self.plain > 1.01 * sent else ""
        text = f"{score}  up {megabytes(self.up)}  down {megabytes(self.down)}{ratio}"
        if self.seconds or self.joules:  # a fleet is simulated
            from fedq.report.tables import duration, joules

            text += f"  {duration(self.seconds)} simulated, {joules(self.joules)}"
        return text


def warn_of_losses(record: Mapping[str, Any]) -> None:
    """Warn of updates that a round lost."""
    lost = {kind: count for kind, count in record["rejected"].items() if count}
    if lost:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(lost.items()))
        alike = Counter(record["reasons"])  # of several clients
        said = "; ".join(f"{n} x {text}" if n > 1 else text for text, n in alike.items())
        reasons = f" ({said})" if said else ""
        LOG.warning("round %d lost updates: %s%s", record["round"], counts, reasons)
    if record.get("skipped"):
        LOG.warning("round %d had no quorum; the model stays as it was", record["round"])


def watch(console: Console) -> Any:
    """Return a context-manager factory that shows one run's progress on ``console``."""

    @contextmanager
    def live(experiment: Experiment) -> Iterator[Observer]:
        totals = _Totals()
        with Progress(
            TextColumn("[bold]{task.description}"),
            TextColumn("round {task.completed}/{task.total}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}"),
            _TimeLeft(),
            console=console,
        ) as progress:
            bar = progress.add_task(
                experiment.name, total=experiment.rounds, text="starting clients", first=0
            )

            def observe(record: Mapping[str, Any]) -> None:
                totals.add(record)
                if record.get("resumed"):  # from before this process: told already, took no time
                    progress.update(bar, first=record["round"])
                else:
                    warn_of_losses(record)
                progress.update(bar, completed=record["round"], text=totals.text())

            yield observe

    @contextmanager
    def plain(experiment: Experiment) -> Iterator[Observer]:
        totals, start, first = _Totals(), time.monotonic(), 0

        def observe(record: Mapping[str, Any]) -> None:
            nonlocal first
            totals.add(record)
            done = record["round"]
            if record.get("resumed"):
                first = done
                return
            warn_of_losses(record)
            left = (time.monotonic() - start) / max(done - first, 1) * (experiment.rounds - done)
            console.print(
                f"{experiment.name}  round {done}/{experiment.rounds}  {totals.text()}"
                + (f"  {left:.0f} s left" if 0 < done < experiment.rounds else ""),
                soft_wrap=True,
                highlight=False,
            )

        yield observe

    return live if console.is_terminal else plain


@contextmanager
def steps(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Show what is being done, step by step, until the end of the context."""
    if not console.is_terminal:

        def say(done: int, total: int, what: str) -> None:
            console.print(f"{done + 1}/{total}  {what}", soft_wrap=True, highlight=False)

        yield say
        return
    with Progress(
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=16),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=what)

        yield show


@contextmanager
def cells(console: Console, total: int) -> Iterator[Display]:
    """Show a sweep of ``total`` cells until the end of the context: all that run, or who ends."""
    if not console.is_terminal:
        yield _PlainCells(console, total)
        return
    # No thread refreshes it: cells are forked from this process.
    with Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[text]}"),
        _TimeLeft(),
        console=console,
        auto_refresh=False,
        transient=True,
    ) as progress:
        yield _LiveCells(console, total, progress)


class _PlainCells:
    """A line for every cell that ends."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0

    def started(self, cell: Cell) -> None:
        """Say nothing: it ends soon enough."""

    def record(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Say nothing."""

    def tick(self) -> None:
        """Say nothing."""

    def ended(self, end: Ended) -> None:
        """Say how."""
        self.done += 1
        if end.summary is None:
            said = f"failed: {end.error}"
        else:
            sent = end.summary["uplink_bytes"] + end.summary["downlink_bytes"]
            said = (
                f"accuracy {100 * end.summary['accuracy']:.1f} %, {megabytes(sent)}, "
                f"{end.summary['seconds']:.0f} s"
            )
        label = end.cell.label or end.cell.experiment.name
        self.console.print(
            f"[{self.done}/{self.total}] {label}: {said}",
            soft_wrap=True, markup=False, highlight=False,
        )  # fmt: skip


class _LiveCells(_PlainCells):
    """The same lines above a bar for the sweep and one for every cell that runs."""

    def __init__(self, console: Console, total: int, progress: Progress) -> None:
        super().__init__(console, total)
        self.progress = progress
        self.bars: dict[Cell, tuple[TaskID, _Totals]] = {}
        self.whole = progress.add_task("all cells", total=total, text="")

    def started(self, cell: Cell) -> None:
        """Add its bar."""
        label = cell.label or cell.experiment.name
        rounds = cell.experiment.rounds
        self.bars[cell] = self.progress.add_task(label, total=rounds, text="starting"), _Totals()

    def record(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Move its bar."""
        bar, totals = self.bars[cell]
        totals.add(record)
        first = {"first": record["round"]} if record.get("resumed") else {}
        self.progress.update(bar, completed=record["round"], text=totals.text(), **first)

    def tick(self) -> None:
        """Draw."""
        self.progress.refresh()

    def ended(self, end: Ended) -> None:
        """Remove its bar and say how."""
        super().ended(end)
        if end.cell in self.bars:
            self.progress.remove_task(self.bars.pop(end.cell)[0])
        self.progress.update(self.whole, completed=self.done)


def log_to_file(file: TextIO) -> None:
    """Send fedq's warnings to a file, one a line."""
    log_to(Console(file=file, width=1000))


def log_to(console: Console) -> None:
    """Send fedq's warnings to ``console``, above a live display."""
    handler = RichHandler(
        console=console, show_time=False, show_path=False, show_level=False, markup=False
    )
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    LOG.handlers = [handler]
    LOG.setLevel(logging.WARNING)
    LOG.propagate = False
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [handler]
