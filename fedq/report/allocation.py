"""An allocation of bits as a table for the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from fedq.metrics import ACCURACY, metric_of
from fedq.report.plots import COLOURS, FAINT

if TYPE_CHECKING:
    from fedq.allocate import Allocation


def render(allocation: Allocation) -> Table:
    """Return one row per layer."""
    table = Table(box=box.SIMPLE)
    for heading in ("layer", "weights", "bits", "added loss"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    rows = zip(
        allocation.layers,
        allocation.weights,
        allocation.chosen.bits,
        allocation.losses,
        strict=True,
    )
    for name, weights, bits, losses in rows:
        table.add_row(name, f"{weights:,}", str(bits), f"{losses[bits]:.2g}")
    return table


def draw(allocation: Allocation, path: Path) -> None:
    """Draw the metric against cost: the Pareto front beside uniform widths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = metric_of(allocation.measured[0]) or ACCURACY
    figure = Figure(figsize=(7, 4.4), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, colour, style in (
        ("front", COLOURS[0], "o-"),
        ("uniform", FAINT, "s-"),
        ("knapsack", COLOURS[1], "D"),
        ("search", COLOURS[2], "*"),
    ):
        points = sorted(
            (point["cost"], metric.scale * point[metric.name])
            for point in allocation.measured
            if point["kind"] == kind
        )
        if not points:
            continue
        costs, scores = zip(*points, strict=True)
        axes.plot(costs, scores, style, color=colour, label=kind, markersize=5, linewidth=1.2)
    axes.axvline(allocation.budget, color=FAINT, linewidth=0.8, linestyle=":")
    axes.set_xlabel(allocation.unit)
    axes.set_ylabel(f"{metric.title} on the test set{', %' if metric.percent else ''}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
