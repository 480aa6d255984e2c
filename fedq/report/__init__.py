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
from fedq.report import heatmap, study_plots, study_tables
from fedq.report.page import page
from fedq.report.plots import plot_accuracy_vs_bytes
from fedq.report.runs import EqualAccuracy, Run, equal_accuracy, find_runs, load_run, survey
from fedq.report.study import Study, remarks
from fedq.report.tables import comparison_table, note, records, to_csv, to_markdown

__all__ = [
    "EqualAccuracy",
    "Run",
    "Study",
    "comparison_table",
    "equal_accuracy",
    "find_runs",
    "load_run",
    "plot_accuracy_vs_bytes",
    "report",
    "to_csv",
    "to_markdown",
]

PLOT = "{}_vs_bytes"
_FEW = 8  # runs whose curves one picture can name


def report(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    reference: str | None = None,
) -> RenderableType:
    """Compare runs: write the files and return what to print.

    One run directory (its float baseline belongs to it) gets ``accuracy_vs_bytes.png``, or that
    of its task's own metric. Several, or a sweep's directory, are a study and get

    =========================  ==================================================================
    ``report.html``            everything, to look at and to play with
    ``report.md``              tables of methods and of runs
    ``summary.csv .tex``       methods: means, intervals, differences from the reference
    ``report.csv``             runs
    ``*.parquet``              both, if pyarrow is there
    ``accuracy_vs_*``          curves, as PNG and SVG
    ``pareto_*``               final accuracy against what it cost, as PNG and SVG
    ``attack_grid.*``          heat map, if attack and aggregator vary
    =========================  ==================================================================

    Args:
      paths: Run directories, or directories that hold some.
      out: Where to write; by default the one path that was given, or ``report/`` for several.
      reference: The method that others are compared with, by its name in the table; by default
        float.

    Raises:
      ConfigError: If a path holds no run, or no run has results.
      FedqError: If a named run's files are damaged, or files cannot be written.
    """
    if not paths:
        raise ConfigError("name at least one run directory, such as runs/2026-11-23_14-05-33")
    found = survey(paths)
    runs = found.runs
    folder = Path(out) if out is not None else Path(paths[0] if len(paths) == 1 else "report")
    said = [note(runs)]
    shown: RenderableType = comparison_table(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder == runs[0].path:
            metrics = [run.metric.name for run in runs if run.curve][:1]
            named = [f"{PLOT.format(metric)}.png" for metric in metrics]
            written = [plot_accuracy_vs_bytes(runs, folder / name) for name in named]
        else:
            study = Study.of(runs, reference)
            doubts = [f"left out: {path}: {reason}" for path, reason in found.left_out.items()]
            doubts += remarks(runs, study)
            if len(study.methods) < len(runs) or len(study.tasks) > 1:
                shown, said = study_tables.table(study), []
            written, hints = _write(study, runs, folder, doubts)
            said += [*doubts, *hints]
            if (grid := heatmap.AttackGrid.of(runs)) is not None:
                written += heatmap.write(grid, folder)
                shown = Group(shown, *heatmap.render(grid))
    except OSError as error:
        message = f"cannot write to {folder}: {error.strerror}; name another folder with --out"
        raise FedqError(message) from error
    said += [f"wrote {path}" for path in written]
    texts = [Text(line, overflow="fold") for line in said if line]
    return Group(shown, Text(), *texts)


def _write(
    study: Study, runs: Sequence[Run], folder: Path, doubts: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """Write all files of a study; return them, and what is missing for others."""
    listed = "\n".join(f"- {line}" for line in doubts)
    texts = {
        "report.html": page(study, doubts),
        "report.md": "\n".join([study_tables.to_markdown(study), "## Runs\n", to_markdown(runs)])
        + (f"\n{listed}\n" if listed else ""),
        "summary.csv": study_tables.to_csv(study),
        "summary.tex": study_tables.to_latex(study),
        "report.csv": to_csv(runs),
    }
    written = []
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    rows = {
        "summary.parquet": [study_tables.record(study, method) for method in study.methods],
        "report.parquet": records(runs),
    }
    hints = []
    for name, table in rows.items():
        hint = study_tables.write_parquet(table, folder / name)
        hints += [hint] if hint else []
        written += [] if hint else [folder / name]
    if any(run.curve for run in runs):
        few = len(runs) <= _FEW and len(study.methods) == len(runs)
        if few:
            plot = PLOT.format(next(run.metric.name for run in runs if run.curve))
            pictures = [f"{plot}.png", f"{plot}.svg"]
            written += [plot_accuracy_vs_bytes(runs, folder / name) for name in pictures]
        written += study_plots.write(study, folder, curves_of_bytes=not few)
    return written, hints
