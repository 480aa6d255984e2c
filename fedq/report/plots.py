"""Figures over runs, drawn without a display and without global state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedq import registry
from fedq.errors import ConfigError, FedqError
from fedq.metrics import ACCURACY, Metric
from fedq.report.runs import Run, equal_accuracy, labels, references
from fedq.report.tables import size

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

#: Okabe and Ito's palette for all kinds of colour vision (Okabe & Ito 2008, "Color universal
#: design"), without its yellow, which is too light for a line; float runs are dark grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FLOAT_COLOUR, TEXT_COLOUR, FAINT = "#4D4D4D", "#262626", "#8C8C8C"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_INCHES, _DPI = (8.0, 5.0), 200
_SUBTITLE = 110  # characters that fit under the title
_GAP = 5.0  # points between a line's end and its label


@dataclass(frozen=True)
class _Line:
    """One run's curve and how it is drawn."""

    label: str
    detail: str
    x: list[float]
    y: list[float]
    style: dict[str, Any]


def readable(label: str) -> str:
    """Return a label as a legend has it: the names of options stay as one types them."""
    return label if "=" in label else label.replace("_", " ")


def plot_accuracy_vs_bytes(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """Draw test accuracy of the deployed model against bytes sent, as PNG (1600 x 1000) or SVG.

    Or the metric of another task: that of the first run, and of the runs that share it.
    One line per run over the bytes of both directions so far (logarithmic), as measured, without
    smoothing. Where a float run is among the runs, the bytes at equal accuracy are compared for
    the run that saves most; see :func:`fedq.report.runs.equal_accuracy`.

    Args:
      runs: At least one run with an evaluated round.
      path: The file to write; its suffix says which kind.

    Raises:
      ConfigError: If no run has an evaluated round.
      FedqError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = next((run.metric for run in runs if run.curve), ACCURACY)
    runs = [run for run in runs if run.metric is metric]
    lines = _lines(runs)
    if not lines:
        raise ConfigError("nothing to plot: no run has evaluated a round of training yet")
    path = Path(path)
    figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.078, 0.115, 0.902, 0.745))
    _frame(figure, axes, runs, lines, metric)
    for line in lines:
        axes.plot(line.x, line.y, label=line.label, solid_capstyle="round", **line.style)
        axes.plot(line.x[-1:], line.y[-1:], "o", color=line.style["color"], markersize=5, zorder=4)
    taken = _label_ends(axes, lines)
    _compare(axes, runs, lines, taken)
    if not taken:
        legend = axes.legend(loc="best", fontsize=9, framealpha=0.9, edgecolor="white")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as its suffix says; the same figure gives the same bytes.

    Raises:
      FedqError: If it cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    about: dict[str, None] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with matplotlib.rc_context({"svg.hashsalt": "fedq", "svg.fonttype": "none"}):
            # Not savefig, which goes through all artists twice.
            if path.suffix == ".svg":
                FigureCanvasSVG(figure).print_svg(temporary, metadata=about)  # type: ignore[no-untyped-call]
            else:
                FigureCanvasAgg(figure).print_png(temporary, metadata=about)  # type: ignore[no-untyped-call]
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FedqError(f"cannot write {path}: {error.strerror}; give another --out") from error
    return path


def _lines(runs: Sequence[Run]) -> list[_Line]:
    lines, coloured = [], 0
    for run, label in zip(runs, labels(runs), strict=True):
        if run.is_float:
            colour, dashes = FLOAT_COLOUR, "-"
        else:
            colour = COLOURS[coloured % len(COLOURS)]
            dashes = _DASHES[coloured // len(COLOURS) % len(_DASHES)]
            coloured += 1
        style = {"color": colour, "linestyle": dashes, "linewidth": 2.0, "zorder": 3}
        if run.curve:
            x, y = zip(*run.curve, strict=True)
            up, down = size(run.uplink_bytes), size(run.downlink_bytes)
            lines.append(
                _Line(
                    readable(label),
                    f"{up} up, {down} down",
                    list(x),
                    [run.metric.scale * value for value in y],
                    style,
                )
            )
    return sorted(lines, key=lambda line: -line.y[-1])


def _frame(
    figure: Figure, axes: Axes, runs: Sequence[Run], lines: Sequence[_Line], metric: Metric
) -> None:
    """Set titles, scales, ticks and grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure.text(
        0.02, 0.955, f"Test {metric.title} of the deployed model against bytes sent", fontsize=14,
        fontweight="bold", color=TEXT_COLOUR, va="center",
    )  # fmt: skip
    figure.text(
        0.02, 0.905, subtitle(runs), fontsize=9.5, color=FAINT, va="center", parse_math=False
    )  # fmt: skip
    low, high = min(min(line.x) for line in lines), max(max(line.x) for line in lines)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, max(high, 4 * low) * 1.25)
    bottom, top = min(min(line.y) for line in lines), max(max(line.y) for line in lines)
    room = max(top - bottom, 5.0 if metric.percent else 0.05 * abs(top))
    axes.set_ylim(max(top - 1.04 * room, 0), top + 0.17 * room)
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0, 3.0) if decades < 4.5 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if metric.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %" if y <= 100 else ""))
    axes.set_xlabel("uplink + downlink bytes of all clients so far", fontsize=10.5, labelpad=6)
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="major", labelsize=10, length=0, pad=6, labelcolor=TEXT_COLOUR)
    axes.tick_params(which="minor", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def subtitle(runs: Sequence[Run]) -> str:
    """Return data set, model, clients and codec in one line, as far as the runs agree."""
    compressed = [run for run in runs if not run.is_float] or list(runs)

    def common(key: str) -> str:
        found = {registry.describe(_name(run.config.get(key))) for run in compressed}
        return found.pop() if len(found) == 1 else ""

    run = compressed[0]
    parts = [common("data"), common("model").replace("auto", "")]
    if parameters := run.summary.get("parameters"):
        parts.append(f"{parameters:,} parameters")
    if clients := run.config.get("clients") or run.summary.get("clients"):
        parts.append(f"{clients} clients, {common('partition')}".rstrip(", "))
    if len({run.codec for run in compressed}) == 1:
        parts.append(run.codec)
    text = " \N{MIDDLE DOT} ".join(part for part in parts if part)
    return text if len(text) <= _SUBTITLE else text[: _SUBTITLE - 1] + "…"


def _name(choice: object) -> object:
    return choice.get("name") if isinstance(choice, Mapping) else choice


def _tick(count: float) -> str:
    """Return a round number of bytes, shortly: ``2 MB``."""
    number, unit = size(count).split()
    return f"{float(number):g} {unit}"


def _compare(
    axes: Axes, runs: Sequence[Run], lines: Sequence[_Line], taken: Sequence[Bbox]
) -> None:
    """Draw the largest saving of bytes at equal accuracy, if there is room for its text."""
    best = None
    for run, reference in zip(runs, references(runs), strict=True):
        if reference is not None and reference is not run:
            equal = equal_accuracy(run, reference)
            if equal is not None and equal.ratio > 1 and (not best or equal.ratio > best.ratio):
                best = equal
    if best is None:
        return
    metric = runs[0].metric
    level, ends = metric.scale * best.level, (best.run_bytes, best.float_bytes)
    times = f"{best.ratio:.{0 if best.ratio >= 10 else 1}f}×"
    for part in (0.5, 0.42, 0.35, 0.28):
        text = axes.annotate(
            f"{times} fewer bytes\nat {metric.text(best.level)}",
            (ends[0] ** (1 - part) * ends[1] ** part, level), (0, -7), ha="center", va="top",
            textcoords="offset points", fontsize=10.5, color=TEXT_COLOUR, linespacing=1.35,
        )  # fmt: skip
        if _free(axes, text.get_window_extent(), lines, taken):
            break
        text.remove()
    else:
        return
    axes.annotate(
        "", (ends[0], level), (ends[1], level), zorder=3.5,
        arrowprops={"arrowstyle": "<|-|>", "color": TEXT_COLOUR, "linewidth": 1.0,
                    "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9},
    )  # fmt: skip


def _label_ends(axes: Axes, lines: Sequence[_Line]) -> list[Bbox]:
    """Write each run's name at its line's end; return their places, none if they do not fit."""
    from matplotlib.offsetbox import AnnotationBbox, TextArea, VPacker

    places: list[tuple[tuple[float, float], tuple[float, float], Literal["left", "right"]]] = [
        ((_GAP, _GAP), (1.0, 0.0), "right"),
        ((_GAP, 2 * _GAP), (1.0, 0.0), "right"),
        ((_GAP, 3 * _GAP), (1.0, 0.0), "right"),
        ((2 * _GAP, 0.0), (0.0, 0.5), "left"),
        ((_GAP, -_GAP), (1.0, 1.0), "right"),
    ]
    written: list[AnnotationBbox] = []
    taken: list[Bbox] = []
    for line in lines:
        for offset, corner, align in places:
            plain = {"color": line.style["color"], "parse_math": False}
            rows: list[Artist] = [
                TextArea(line.label, textprops=plain | {"size": 11, "weight": "bold"}),
                TextArea(line.detail, textprops=plain | {"size": 8.5}),
            ]
            box = AnnotationBbox(
                VPacker(children=rows, align=align, pad=0, sep=3), (line.x[-1], line.y[-1]), offset,
                boxcoords="offset points", box_alignment=corner, pad=0.1, zorder=6,
                bboxprops={"facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )  # fmt: skip
            axes.add_artist(box)
            extent = box.get_window_extent()
            if _free(axes, extent, lines, taken):
                taken.append(extent)
                written.append(box)
                break
            box.remove()
        else:
            for box in written:
                box.remove()
            return []
    return taken


def _free(axes: Axes, box: Bbox, lines: Sequence[_Line], taken: Sequence[Bbox]) -> bool:
    """Whether a text's box, in pixels, is inside the axes and touches no line and no text."""
    from matplotlib.path import Path as Polyline

    frame = axes.get_window_extent()  # a label may reach into the margin below the subtitle
    return (
        frame.x0 <= box.x0
        and box.x1 <= frame.x1
        and frame.y0 <= box.y0
        and box.y1 <= frame.y1 + 0.02 * frame.height
        and not any(box.overlaps(other) for other in taken)
        and not any(
            Polyline(
                axes.transData.transform(list(zip(line.x, line.y, strict=True)))
            ).intersects_bbox(box, filled=False)
            for line in lines
        )
    )
