"""Attack x aggregator x codec: what a sweep over attacks says in one picture and one table."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedq import registry
from fedq.errors import FedqError
from fedq.metrics import ACCURACY
from fedq.report.plots import FAINT, TEXT_COLOUR, subtitle
from fedq.report.runs import Run
from fedq.results import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEM = "attack_grid"
#: What is shown of a run's summary, and whether more of it is good.
METRICS: Mapping[str, tuple[str, bool]] = {
    "accuracy": ("accuracy", True),
    "attack_success": ("backdoor success", False),
}
_CELL_INCHES, _DPI = (0.95, 0.42), 160


@dataclass(frozen=True)
class AttackGrid:
    """Finished runs by attack, aggregator and codec.

    Attributes:
      runs: They may differ in seed as well; cells are means over those.
    """

    runs: tuple[Run, ...]

    @classmethod
    def of(cls, runs: Iterable[Run]) -> AttackGrid | None:
        """Return the grid of a sweep's runs; None unless attacks and aggregators vary."""
        grid = cls(tuple(run for run in runs if run.finished and run.path.name != BASELINE))
        return grid if len(grid.attacks) > 1 and len(grid.aggregators) > 1 else None

    @cached_property
    def attacks(self) -> list[str]:
        """Rows: no attack first, the others as they come."""
        named = dict.fromkeys(self._place(run)[0] for run in self.runs)
        return sorted(named, key=lambda name: name != "none")

    @cached_property
    def aggregators(self) -> list[str]:
        """Columns, as they come."""
        return list(dict.fromkeys(self._place(run)[1] for run in self.runs))

    @cached_property
    def codecs(self) -> list[str]:
        """Facets, as they come."""
        return list(dict.fromkeys(self._place(run)[2] for run in self.runs))

    @cached_property
    def metrics(self) -> list[str]:
        """Keys of :data:`METRICS` that a run has."""
        return [key for key in METRICS if any(key in run.summary for run in self.runs)]

    @cached_property
    def fraction(self) -> float | None:
        """Of clients that are hostile, where all attacks agree."""
        found = {
            float(choice["fraction"])
            for run in self.runs
            if isinstance(choice := run.config.get("attack"), Mapping) and "fraction" in choice
        }
        return found.pop() if len(found) == 1 else None

    def values(self, metric: str, attack: str, aggregator: str, codec: str) -> list[float]:
        """Return a cell's figures, one per run; empty if there is no such run."""
        return [
            float(run.summary[metric])
            for run in self.runs
            if self._place(run) == (attack, aggregator, codec)
            and isinstance(run.summary.get(metric), int | float)
        ]

    def mean(self, metric: str, attack: str, aggregator: str, codec: str) -> float | None:
        """Return a cell's mean, None if it is empty."""
        found = self.values(metric, attack, aggregator, codec)
        return sum(found) / len(found) if found else None

    def rows(self, metric: str) -> list[str]:
        """Return the attacks of which there is such a figure."""
        return [
            attack
            for attack in self.attacks
            if any(self._place(run)[0] == attack and metric in run.summary for run in self.runs)
        ]

    @property
    def caption(self) -> str:
        """What the cells are of, in one sentence."""
        seeds = len({run.config.get("seed") for run in self.runs})
        share = "" if self.fraction is None else f"{self.fraction:.0%} of clients hostile; "
        return f"{share}mean of {seeds} seed{'s' if seeds > 1 else ''}"

    def _place(self, run: Run) -> tuple[str, str, str]:
        attack = run.config.get("attack")
        if isinstance(attack, Mapping) and self.fraction is not None:
            attack = {key: value for key, value in attack.items() if key != "fraction"}
        return _described(attack, "attack"), _described(run.config.get("aggregator")), run.codec


def _described(choice: Any, group: str = "aggregator") -> str:
    if isinstance(choice, Mapping) and isinstance(inner := choice.get("inner"), Mapping):
        # The inner attack's own fraction does not count.
        inner = {key: value for key, value in inner.items() if key != "fraction"}
        choice = {**choice, "inner": inner}
    return registry.describe(choice, group) if choice else "none"


def render(grid: AttackGrid) -> list[Table]:
    """Return one table per codec: a row per attack, accuracy above and success below."""
    tables = []
    for codec in grid.codecs:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=Text(codec))
        table.add_column("attack", overflow="fold", min_width=12)
        for aggregator in grid.aggregators:
            table.add_column(Text(aggregator), justify="right", overflow="fold")
        for attack in grid.attacks:
            cells = []
            for aggregator in grid.aggregators:
                first, *more = (grid.mean(m, attack, aggregator, codec) for m in grid.metrics)
                cell = Text(ACCURACY.text(first))
                for value in more:
                    if value is not None:
                        cell.append(f"\nASR {ACCURACY.text(value)}", "dim")
                cells.append(cell)
            table.add_row(Text(attack), *cells)
        tables.append(table)
    return tables


def to_markdown(grid: AttackGrid) -> str:
    """Return one GitHub table per metric and codec."""
    lines = [f"Percent; {grid.caption}.", ""]
    for metric in grid.metrics:
        for codec in grid.codecs:
            lines += [f"**{METRICS[metric][0]}**, {codec}", ""]
            lines += [f"| attack | {' | '.join(grid.aggregators)} |"]
            lines += [f"|---|{'---:|' * len(grid.aggregators)}"]
            for attack in grid.rows(metric):
                cells = [grid.mean(metric, attack, rule, codec) for rule in grid.aggregators]
                shown = ["" if cell is None else f"{100 * cell:.1f}" for cell in cells]
                lines.append(f"| {attack} | {' | '.join(shown)} |")
            lines.append("")
    return "\n".join(lines)


def to_csv(grid: AttackGrid) -> str:
    """Return one row per cell: means and standard deviations over seeds, in [0, 1]."""
    out = io.StringIO()
    columns = [f"{metric}{kind}" for metric in grid.metrics for kind in ("", "_deviation")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["attack", "aggregator", "codec", "runs", *columns])
    for codec in grid.codecs:
        for attack in grid.attacks:
            for aggregator in grid.aggregators:
                cells: list[Any] = []
                for metric in grid.metrics:
                    cells += _mean_and_deviation(grid.values(metric, attack, aggregator, codec))
                count = len(grid.values(grid.metrics[0], attack, aggregator, codec))
                writer.writerow([attack, aggregator, codec, count, *cells])
    return out.getvalue()


def _mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def write(grid: AttackGrid, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``attack_grid``: the heat map (png, svg) and the tables (md, csv); return the paths.

    Raises:
      FedqError: If they cannot be written.
    """
    folder = Path(folder)
    try:
        figure = plot(grid)
        written = [save(figure, folder / f"{STEM}.{kind}") for kind in ("png", "svg")]
        for kind, text in (("md", to_markdown(grid)), ("csv", to_csv(grid))):
            written.append(folder / f"{STEM}.{kind}")
            written[-1].write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"cannot write to {folder}: {error.strerror}; name another folder with --out"
        raise FedqError(message) from error
    return written


def plot(grid: AttackGrid) -> Figure:
    """Return the heat map: a panel per codec (across) and metric (down); light cells are good."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(grid.metrics), len(grid.codecs)
    heights = [len(grid.rows(metric)) for metric in grid.metrics]
    width = columns * (_CELL_INCHES[0] * len(grid.aggregators) + 0.3) + 2.4
    figure = Figure(
        figsize=(max(width, 6.4), _CELL_INCHES[1] * sum(heights) + 0.5 * rows + 1.9),
        dpi=_DPI, facecolor="white", layout="constrained",
    )  # fmt: skip
    FigureCanvasAgg(figure)
    title = "Robustness of aggregation rules under attack"
    figure.suptitle(title, fontsize=13, fontweight="bold", color=TEXT_COLOUR, x=0.01, ha="left")
    panels = figure.subplots(
        rows, columns, squeeze=False, sharex=True, sharey="row", height_ratios=heights
    )
    for down, metric in enumerate(grid.metrics):
        for across, codec in enumerate(grid.codecs):
            _panel(panels[down, across], grid, metric, codec)
    about = f"{subtitle(grid.runs)} \N{MIDDLE DOT} {grid.caption}; light is good"
    figure.supxlabel(about, fontsize=8.5, color=FAINT, x=0.01, ha="left", parse_math=False)
    return figure


def _panel(axes: Axes, grid: AttackGrid, metric: str, codec: str) -> None:
    import numpy as np

    attacks = grid.rows(metric)
    cells = [[grid.mean(metric, attack, rule, codec) for rule in grid.aggregators]
             for attack in attacks]  # fmt: skip
    values = np.array([[np.nan if cell is None else 100 * cell for cell in row] for row in cells])
    good = METRICS[metric][1]
    axes.imshow(values, vmin=0, vmax=100, cmap="cividis" if good else "cividis_r", aspect="auto")
    axes.set_facecolor("#E6E6E6")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = value if good else 100 - value
            colour = TEXT_COLOUR if light > 50 else "white"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color=colour)
        else:
            axes.text(j, i, "\N{EN DASH}", ha="center", va="center", fontsize=9, color=FAINT)
    title = f"{METRICS[metric][0]}, % \N{MIDDLE DOT} {codec}"
    axes.set_title(title, fontsize=9, color=TEXT_COLOUR, loc="left", parse_math=False)
    axes.set_xticks(range(len(grid.aggregators)), grid.aggregators, parse_math=False)
    axes.set_yticks(range(len(attacks)), attacks, parse_math=False)
    axes.tick_params(length=0, labelsize=9, labelcolor=TEXT_COLOUR)
    for label in axes.get_xticklabels():
        label.set(rotation=25, ha="right", rotation_mode="anchor")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(grid.aggregators))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(attacks))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, by the file's suffix, and return the path."""
    import matplotlib

    # A fixed salt and no date: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fedq", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date" if path.suffix == ".svg" else "Software": None})
    return path
