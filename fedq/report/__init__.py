"""Tables and plots over run directories.

``fedq report RUN...`` is :func:`report`; the parts are here for notebooks::

    runs = find_runs(["runs/2026-11-23_14-05-33"])
    print(to_markdown(runs))
    plot_accuracy_vs_bytes(runs, "accuracy_vs_bytes.png")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from fedq.errors import ConfigError, FedqError
from fedq.report import heatmap
from fedq.report.plots import plot_accuracy_vs_bytes
from fedq.report.runs import EqualAccuracy, Run, equal_accuracy, find_runs, load_run
from fedq.report.tables import comparison_table, note, to_csv, to_markdown

__all__ = [
    "EqualAccuracy",
    "Run",
    "comparison_table",
    "equal_accuracy",
    "find_runs",
    "load_run",
    "plot_accuracy_vs_bytes",
    "report",
    "to_csv",
    "to_markdown",
]

PLOT, MARKDOWN, CSV = "{}_vs_bytes.png", "report.md", "report.csv"


def report(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> RenderableType:
    """Compare runs: write the files and return what to print.

    One run directory (its float baseline belongs to it) gets ``accuracy_vs_bytes.png``, or that
    of the task's own metric. Several, or a sweep's directory, get the plot, ``report.md`` and
    ``report.csv``; a sweep over attacks and aggregators gets its heat map as well
    (:mod:`fedq.report.heatmap`).

    Args:
      paths: Run directories, or directories that hold some.
      out: Where to write; by default the one path that was given, or ``report/`` for several.

    Raises:
      ConfigError: If a path holds no run, or no run has results.
      FedqError: If files are damaged or cannot be written.
    """
    if not paths:
        raise ConfigError("name at least one run directory, such as runs/2026-11-23_14-05-33")
    runs = find_runs(paths)
    folder = Path(out) if out is not None else Path(paths[0] if len(paths) == 1 else "report")
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(run.curve for run in runs):
            metric = next(run.metric for run in runs if run.curve)
            plot = folder / PLOT.format(metric.name)
            written.append(plot_accuracy_vs_bytes(runs, plot))
        if folder != runs[0].path:
            for name, text in ((MARKDOWN, to_markdown(runs)), (CSV, to_csv(runs))):
                (folder / name).write_text(text, encoding="utf-8")
                written.append(folder / name)
    except OSError as error:
        message = f"cannot write to {folder}: {error.strerror}; name another folder with --out"
        raise FedqError(message) from error
    grid = heatmap.AttackGrid.of(runs)
    if grid is not None:
        written += heatmap.write(grid, folder)
    lines = [note(runs), *(f"wrote {path}" for path in written)]
    texts = [Text(line, overflow="fold") for line in lines if line]
    tables = heatmap.render(grid) if grid is not None else []
    return Group(comparison_table(runs), *tables, Text(), *texts)
