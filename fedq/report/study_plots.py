"""Pictures of a study: Pareto fronts, and curves of means with their intervals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedq.metrics import Metric
from fedq.report.plots import COLOURS, FAINT, FLOAT_COLOUR, TEXT_COLOUR, readable, save
from fedq.report.study import Method, Study, loss
from fedq.report.tables import duration, joules, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What a cost is called on an axis, and how its numbers are written.
AXES: dict[str, tuple[str, Any]] = {
    "total_bytes": ("uplink + downlink bytes", size),
    "uplink_bytes": ("uplink bytes", size),
    "downlink_bytes": ("downlink bytes", size),
    "wire_bytes": ("bytes on the wire", size),
    "simulated_seconds": ("simulated time", duration),
    "joules": ("energy of all devices", joules),
}
_PANELS = {
    "bytes": ("total_bytes", "uplink_bytes", "downlink_bytes", "wire_bytes"),
    "time": ("simulated_seconds",),
    "energy": ("joules",),
}
_MOST = 10  # methods with a colour and a name; others are grey
_DPI = 160


def known_costs(study: Study) -> list[str]:
    """Return the costs that some run tells of."""
    return [cost for cost in AXES if any(cost in m.curve for m in study.methods)]


def write(study: Study, folder: Path, *, curves_of_bytes: bool = True) -> list[Path]:
    """Draw all pictures of a study as PNG and SVG; return their paths.

    ``pareto_*`` are of final scores, ``accuracy_vs_*`` (or the one metric of all tasks, or
    ``score``) of the way there. Costs that no run tells of have no picture.

    Args:
      study: What to draw.
      folder: Where to.
      curves_of_bytes: Whether to draw the scores against bytes.

    Raises:
      FedqError: If a file cannot be written.
    """
    written = []
    known = known_costs(study)
    metrics = {study.metric(task).name for task in study.tasks}
    metric = metrics.pop() if len(metrics) == 1 else "score"
    for name, costs in _PANELS.items():
        shown = [cost for cost in costs if cost in known]
        if not shown:
            continue
        pictures: dict[str, tuple[Any, list[str]]] = {f"pareto_{name}": (_pareto, shown)}
        if name != "bytes" or curves_of_bytes:
            pictures[f"{metric}_vs_{name}"] = (_curves, shown[:1])
        for title, (draw, panels) in pictures.items():
            figure = _figure(study, panels, draw)
            written += [save(figure, folder / f"{title}.{kind}") for kind in ("png", "svg")]
    return written


def _figure(study: Study, costs: Sequence[str], draw: Any) -> Figure:
    """Return a figure of a row per task and a column per cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(study.tasks), len(costs)
    inches = (4.3 * columns + 2.6 if columns > 1 else 8.0, 3.7 * rows + 0.6)
    figure = Figure(figsize=inches, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for line, (task, methods) in zip(grid, study.tasks.items(), strict=True):
        styles = _styles(study, task, methods)
        for axes, cost in zip(line, costs, strict=True):
            draw(axes, study, task, cost, styles)
            _frame(axes, cost, study.metric(task))
        line[0].set_ylabel(f"{study.metric(task).title} of the deployed model", fontsize=10)
        line[0].set_title(task, fontsize=11, color=TEXT_COLOUR, loc="left", parse_math=False)
        _legend(line[-1], styles)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")  # once for both kinds of file
    return figure


def _styles(study: Study, task: str, methods: Sequence[Method]) -> dict[Method, dict[str, Any]]:
    """Give the prominent methods a colour each; the others are grey."""
    named = study.prominent(task, _MOST)
    styles: dict[Method, dict[str, Any]] = {}
    colours = itertools.cycle(COLOURS)
    for place, method in enumerate([*named, *(m for m in methods if m not in named)]):
        if method.is_reference and method.runs[0].is_float:
            styles[method] = {"color": FLOAT_COLOUR, "marker": "s"}
        elif place < _MOST:
            marker = "o" if place <= len(COLOURS) else "^"
            styles[method] = {"color": next(colours), "marker": marker}
        else:
            styles[method] = {"color": "#C8C8C8", "marker": "."}
    return styles


def _pareto(
    axes: Axes, study: Study, task: str, cost: str, styles: dict[Method, dict[str, Any]]
) -> None:
    scale = study.metric(task).scale
    for method, style in reversed(styles.items()):
        spent, score = method.mean(cost), method.mean("score")
        if spent is None or score is None:
            continue
        named = style["marker"] != "."
        if not named:
            axes.plot([spent.mean], [scale * score.mean], markersize=4, zorder=3, **style)
            continue
        axes.errorbar(
            [spent.mean], [scale * score.mean], linestyle="none", markersize=6,
            yerr=None if score.half is None else [scale * score.half],
            xerr=None if spent.half is None else [min(spent.half, 0.999 * spent.mean)],
            elinewidth=1, capsize=2, zorder=4, **style,
        )  # fmt: skip
    steps = [(m.mean(cost), m.mean("score")) for m in study.front(task, cost)]
    points = [(x.mean, scale * y.mean) for x, y in steps if x is not None and y is not None]
    if len(points) > 1:
        axes.step(*zip(*points, strict=True), where="post", color=FAINT, linewidth=1, zorder=2)


def _curves(
    axes: Axes, study: Study, task: str, cost: str, styles: dict[Method, dict[str, Any]]
) -> None:
    metric = study.metric(task)
    scale = metric.scale
    for method, style in reversed(styles.items()):
        curve = method.curve
        if not curve.get(cost):
            continue
        named = style["marker"] != "."
        x, y = curve[cost], [scale * value for value in curve["score"]]
        half = [scale * value for value in curve["half"]]
        axes.plot(x, y, color=style["color"], linewidth=1.7 if named else 0.8, zorder=3 + named)
        if named and len(method.finished) > 2:  # of two, the interval covers all
            low = [value - h for value, h in zip(y, half, strict=True)]
            high = [value + h for value, h in zip(y, half, strict=True)]
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(x[-1:], y[-1:], markersize=5, zorder=5, linestyle="none", **style)
    finals = [scale * m.curve["score"][-1] for m in styles if m.curve["score"]]
    if finals:  # what is far worse is not what one looks for
        best, worst = metric.best(finals), metric.worst(finals)
        room = max(abs(best - worst), 0.05 * (100.0 if metric.percent else abs(best) or 1.0))
        away = room if metric.higher_is_better else -room
        floor, top = sorted((worst - 0.5 * away, best + 0.12 * away))
        floor, top = max(floor, 0.0), min(top, 100.5) if metric.percent else top
        axes.set_ylim(floor, top)
        seen = [
            x
            for method in styles
            for x, y in zip(method.curve.get(cost, []), method.curve["score"], strict=False)
            if floor <= scale * y <= top
        ]
        axes.set_xscale("log")
        axes.set_xlim(min(seen) / 1.2, max(seen) * 1.2)


def _frame(axes: Axes, cost: str, metric: Metric) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    name, written = AXES[cost]
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 30 * low else (1.0, 3.0) if high < 1e3 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(written(x))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if metric.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %" if y <= 100 else ""))
    axes.set_xlabel(name, fontsize=10)
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=TEXT_COLOUR)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _short(text: str) -> str:
    """Return a quantity without trailing zeros.

    >>> _short("1.00 MB"), _short("30 s"), _short("0.5 s")
    ('1 MB', '30 s', '0.5 s')
    """
    amount, unit = text.split(" ", 1)
    return f"{float(amount):g} {unit}"


def _legend(axes: Axes, styles: dict[Method, dict[str, Any]]) -> None:
    """Write the names beside the row, best first."""
    from matplotlib.lines import Line2D

    named = [(m, style) for m, style in styles.items() if style["marker"] != "."]
    named.sort(key=lambda pair: loss(pair[0]))
    handles = [Line2D([], [], linestyle="-", linewidth=1.7, **style) for _, style in named]
    names = [readable(method.label) for method, _ in named]
    if others := len(styles) - len(named):
        handles.append(Line2D([], [], color="#C8C8C8", marker=".", linewidth=0.8))
        names.append(f"{others} others")
    legend = axes.legend(
        handles, names, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
