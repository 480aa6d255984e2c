"""A survey of codecs (:mod:`fedq.codec_report`) as a table for the terminal and as a picture."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedq.codec_report import COHORTS, OWN_IMAGES, Figures, Survey, gaussian_limit
from fedq.errors import FedqError
from fedq.report.plots import COLOURS, FAINT, TEXT_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS, JSON = ("codecs.png", "codecs.svg"), "codecs.json"
#: Colour and marker of codecs that promise no bias, and of the others.
_KINDS = {True: (COLOURS[0], "o"), False: (COLOURS[1], "s")}
_INCHES, _DPI = (12.0, 6.4), 160
_LEAST = 1e-5  # NMSE below it is drawn on the lower edge


def codec_table(survey: Survey) -> RenderableType:
    """Return unbiased codecs, then biased ones, each from few bits to many; for 100 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    table.add_column("codec", overflow="fold", min_width=16)
    for header in (
        "bits per\nparameter", "header\nbytes", "NMSE of\none client", f"mean\nof {COHORTS[0]}",
        f"mean\nof {COHORTS[1]}", "bias\nratio", "Gaussian\nlimit", "encode\nMB/s", "decode\nMB/s",
    ):  # fmt: skip
        table.add_column(header, justify="right", no_wrap=True)
    for unbiased, rows in _groups(survey.figures):
        law = "1/(4^R-1)" if unbiased else "4^-R"
        word = "unbiased" if unbiased else "biased"
        table.add_row(Text(f"{word}, limit {law}", "bold"))
        for row in rows:
            table.add_row(
                Text(row.codec),
                f"{row.bits_per_parameter:.3g}",
                f"{row.header_bytes}",
                short(row.nmse),
                *(short(row.nmse_of_mean[n]) for n in COHORTS),
                "-" if row.bias_ratio is None else f"{row.bias_ratio:.3g}",
                short(row.limit),
                _speed(row.encode_mb_s),
                _speed(row.decode_mb_s),
            )
        table.add_section()
    notes = [caption(survey)]
    notes += [f"left out: {name}: {reason}" for name, reason in survey.left_out.items()]
    return Group(table, Text(), *(Text(note) for note in notes))


def caption(survey: Survey) -> str:
    """Return what was measured, on what."""
    return (
        f"One client's update of {survey.model} ({survey.parameters:,} parameters; 2 epochs on "
        f"{OWN_IMAGES} images of MNIST-5k, seed {survey.seed}). Bytes are those of payloads, with "
        "their header. Means are of this one update under n seeds of the codec, so that what stays "
        "is bias; where time sufficed for fewer seeds, they are estimates. Bias ratio: "
        f"n NMSE(n) / NMSE(1), n = {max(COHORTS)} or the seeds tried: 1 if errors average out, n "
        "if they stay. MB of float32 per second of CPU. Updates are not Gaussian, so codes may go "
        "below the limit."
    )


def short(value: float | None) -> str:
    """Return a positive number in at most seven characters.

    >>> [short(v) for v in (None, 0, 1.2345, 0.01234, 0.00012345, 2.5e-12)]
    ['-', '0', '1.23', '0.0123', '1.23e-4', '2.5e-12']
    """
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    if int(exponent) <= -10:
        digits = f"{float(digits):.1f}"
    return f"{digits}e{int(exponent)}"


def write(survey: Survey, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``codecs.png``, ``codecs.svg`` and ``codecs.json``; return their paths.

    Raises:
      FedqError: If they cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure = plot(survey)
        written = [_save(figure, folder / name) for name in PLOTS]
        (folder / JSON).write_text(to_json(survey) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"cannot write to {folder}: {error.strerror}; name another folder with --out"
        raise FedqError(message) from error
    return [*written, folder / JSON]


def to_json(survey: Survey) -> str:
    """Return a survey as JSON text."""
    return json.dumps(survey.to_json(), indent=1, allow_nan=False)


def plot(survey: Survey) -> Figure:
    """Draw NMSE against bits per parameter: of one client, and of the mean of many."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(
        0.012, 0.955, "Error against bytes, on a real update", fontsize=14, fontweight="bold",
        color=TEXT_COLOUR, va="center",
    )  # fmt: skip
    figure.text(
        0.012, 0.915, f"{survey.model} \N{MIDDLE DOT} {survey.parameters:,} parameters "
        "\N{MIDDLE DOT} every header counted \N{MIDDLE DOT} mean: of the same update under "
        f"{COHORTS[-1]} seeds", fontsize=9.5, color=FAINT, va="center", parse_math=False,
    )  # fmt: skip
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.09, top=0.84, wspace=0.05)
    errors: list[dict[str, float | None]] = [{f.codec: f.nmse for f in survey.figures}]
    errors += [{f.codec: f.nmse_of_mean[COHORTS[-1]] for f in survey.figures}]
    shown = [e for of in errors for e in of.values() if e is not None and e > 0]
    rates = [f.bits_per_parameter for f in survey.figures]
    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
    panels[0].set_xlim(min(rates) / 1.6, max(rates) * 1.6)
    panels[0].set_ylim(max(min(shown, default=1) / 3, _LEAST), max([*shown, 1.0]) * 4)
    for axes, of, clients in zip(panels, errors, (1, COHORTS[-1]), strict=True):
        _frame(axes, "one client" if clients == 1 else f"mean of {clients}")
        _limits(axes, clients)
        _points(axes, survey.figures, of)
    panels[0].set_ylabel("NMSE", fontsize=10.5)
    return figure


def _groups(figures: Sequence[Figures]) -> list[tuple[bool, list[Figures]]]:
    ordered = sorted(figures, key=lambda row: (not row.unbiased, row.bits_per_parameter))
    return [(key, list(rows)) for key, rows in itertools.groupby(ordered, lambda r: r.unbiased)]


def _speed(value: float) -> str:
    return f"{value:.{0 if value >= 9.95 else 1}f}"


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib

    # A fixed salt and no date: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fedq", "svg.fonttype": "none"}):
        if path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None})
        else:
            figure.savefig(path, metadata={"Software": None})
    return path


def _frame(axes: Axes, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_title(title, fontsize=11, color=TEXT_COLOUR, loc="left")
    axes.set_xlabel("bits per parameter", fontsize=10.5)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else _part(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9.5, labelcolor=TEXT_COLOUR)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color("#E6E6E6")


def _part(x: float) -> str:
    return f"1/{1 / x:.0f}"


def _limits(axes: Axes, clients: int) -> None:
    """Draw the Gaussian limits; only that of unbiased codes falls with the number of clients."""
    low, high = axes.get_xlim()
    steps = 200
    rates = [low * (high / low) ** (i / steps) for i in range(steps + 1)]
    for unbiased in (False, True):
        errors = [
            gaussian_limit(r, unbiased=unbiased) / (clients if unbiased else 1) for r in rates
        ]
        law = r"$1/(4^R-1)$" if unbiased else r"$4^{-R}$"
        if unbiased and clients > 1:
            law = rf"$1/({clients}\,(4^R-1))$"
        axes.plot(
            rates, errors, color=_KINDS[unbiased][0], linewidth=1.1, zorder=2, alpha=0.7,
            linestyle=(0, (5, 2)), label=f"Gaussian limit {law}",
        )  # fmt: skip


def _points(axes: Axes, figures: Sequence[Figures], errors: dict[str, float | None]) -> None:
    """Draw the codecs, those of one name joined, each name written once."""
    bottom = axes.get_ylim()[0]
    names: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for row in sorted(figures, key=lambda row: row.bits_per_parameter):
        error = errors[row.codec]
        if error is not None:
            place = (row.bits_per_parameter, max(error, bottom))
            names.setdefault((row.config["name"], row.unbiased), []).append(place)
    for unbiased, (colour, marker) in _KINDS.items():
        axes.plot(
            [], [], marker, color=colour, label="unbiased" if unbiased else "biased", markersize=6,
            markerfacecolor=colour if unbiased else "white",
        )  # fmt: skip
    for (_, unbiased), places in names.items():
        colour, marker = _KINDS[unbiased]
        axes.plot(*zip(*places, strict=True), color=colour, linewidth=0.7, alpha=0.35, zorder=2.5)
        for x, y in places:
            axes.plot(
                [x], [y], marker if y > bottom else "v", color=colour, markersize=5.5, zorder=4,
                markerfacecolor=colour if unbiased else "white", clip_on=False,
            )  # fmt: skip
    axes.legend(loc="lower left", fontsize=8.5, framealpha=0.9, edgecolor="white")
    _label(axes, names)


def _label(axes: Axes, names: dict[tuple[str, bool], list[tuple[float, float]]]) -> None:
    """Write each name as near as possible to one of its points, over no point and no other name."""
    from matplotlib.transforms import Bbox

    legend = axes.get_legend()
    assert legend is not None
    taken = [legend.get_window_extent()]
    frame = axes.get_window_extent()
    for places in names.values():
        for x, y in axes.transData.transform(places):
            taken.append(Bbox.from_bounds(x - 7, y - 7, 14, 14))
    ring = [(math.cos(a), math.sin(a)) for a in (2 * math.pi * k / 16 for k in range(16))]
    offsets = [(r * dx, r * dy, r) for r in range(8, 96, 8) for dx, dy in ring]
    for (name, unbiased), places in sorted(names.items(), key=lambda item: len(item[1])):
        tries = ((o, place) for o in offsets for place in places)
        for (dx, dy, radius), place in tries:
            text = axes.annotate(
                name, place, (dx, dy), textcoords="offset points", fontsize=8.5,
                color=_KINDS[unbiased][0], va="center", parse_math=False, zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3},
                ha="left" if dx > 1 else "right" if dx < -1 else "center",
                arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 1,
                            "shrinkB": 4} if radius > 16 else None,
            )  # fmt: skip
            extent = text.get_window_extent().padded(1)
            inside = (
                frame.x0 < extent.x0 and extent.x1 < frame.x1
                and frame.y0 < extent.y0 and extent.y1 < frame.y1
            )  # fmt: skip
            if inside and not any(extent.overlaps(other) for other in taken):
                taken.append(extent)
                break
            text.remove()
