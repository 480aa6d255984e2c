"""The pictures of docs/concepts.md: a round, and what becomes of one update.

``python docs/make.py`` draws the first, ``python docs/make_concepts.py`` trains a client for the
second.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import _make
import numpy as np
from _make import BLUE, DOCS, GREEN, GREY, INK, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALE = {BLUE: "#E3EFF7", RED: "#FBE9DE", GREEN: "#DDF2EA", GREY: "#F2F2F2"}


def draw() -> None:
    """Draw a round."""
    with _make.picture(DOCS / "concepts_round.svg", (9, 4.5)) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, 110)
        axes.set_ylim(0, 55)
        _round(axes)


def _round(axes: Axes) -> None:
    shares = ((9, 1, 0, 2), (0, 7, 2, 0), (1, 0, 3, 8))
    for place, counts in enumerate(shares):
        y = 37 - 16 * place
        _box(axes, 3, y, 30, 13, BLUE)
        axes.text(5, y + 10.2, f"client {place + 1}", fontsize=10, fontweight="bold", color=INK)
        _bars(axes, 5, y + 1.8, counts)
        axes.text(
            14.5,
            y + 5.2,
            "trains a quantized\nnetwork on its rows",
            fontsize=8.5,
            color=INK,
            va="center",
        )
        _arrow(axes, (70, 37 - 6.6 * place), (33.6, y + 8.6), BLUE)
        _arrow(axes, (33.6, y + 4.2), (70, 33.5 - 6.6 * place), RED)
    _box(axes, 70, 10, 37, 36, GREEN)
    axes.text(72, 42.3, "server", fontsize=10, fontweight="bold", color=INK)
    steps = (
        "1  choose clients by the seed",
        "2  encode the model once",
        "5  check and decode each reply",
        "6  average, exactly, as they come",
        "7  move the float model",
        "8  judge the int8 model; save",
    )
    for place, text in enumerate(steps):
        axes.text(73, 38.3 - 4.9 * place, text, fontsize=9.5, color=INK, va="center")
    for x, y, text, colour in (
        (51, 49.2, "3  the model: only what changed", BLUE),
        (51, 4.8, "4  each update, in a few tenths of a bit", RED),
    ):
        axes.text(
            x, y, text, fontsize=9.5, color=colour, ha="center", va="center", fontweight="bold"
        )
    axes.text(
        51, 1.6, "every size in a report is the length of such a message", fontsize=8.5, color=GREY,
        ha="center", va="center",
    )  # fmt: skip


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=1.2",
            linewidth=1.4,
            edgecolor=colour,
            facecolor=PALE[colour],
        )
    )


def _bars(axes: Axes, x: float, y: float, counts: tuple[int, ...]) -> None:
    """Draw how many rows of each class a client has."""
    for place, count in enumerate(counts):
        axes.bar(x + 1.9 * place + 0.8, 0.2 + 0.75 * count, 1.5, y, color=BLUE)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    look: Any = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=look)


def update(path: Path) -> None:
    """Draw what the default codec makes of one client's update, and in how many bits."""
    from fedq import build, codec_report
    from fedq.codecs.base import Codec

    x, layout = codec_report.client_update(build("model", "small_cnn"), seed=0)
    codec: Codec = build("codec", "uniform", bits=5, rounding="dithered", scale="model")
    payload = codec.encode(x, layout, seed=1)
    step = float(np.abs(x).max()) / (2**4 - 1)
    levels = np.round(x / step + np.random.default_rng(0).uniform(-0.5, 0.5, x.size))
    counts = {level: int((levels == level).sum()) for level in range(-2, 3)}
    bits = 8 * len(payload) / x.size
    with _make.picture(path, (9, 3.2)) as figure:
        panels = figure.subplots(1, 3, width_ratios=(1.2, 1, 0.8))
        figure.subplots_adjust(left=0.03, right=0.985, bottom=0.18, top=0.85, wspace=0.12)
        titles = (
            "1  Real changes, on a grid",
            "2  Levels: nearly all are 0",
            "3  Bits per parameter",
        )
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold", pad=10)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0, labelsize=9)
            axes.set_yticks([])
        panels[0].hist(x / step, bins=np.linspace(-2.5, 2.5, 121), color=BLUE)
        for border in np.arange(-2, 3):
            panels[0].axvline(border, color=RED, linewidth=1)
        panels[0].set_xlabel("change of a parameter, in steps", fontsize=9)
        panels[1].bar(list(counts), list(counts.values()), color=BLUE)
        for level, count in counts.items():
            share = f"{100 * count / x.size:.2g} %"
            panels[1].text(level, count, share, ha="center", va="bottom", fontsize=8.5, color=INK)
        panels[1].set_xlabel("level sent", fontsize=9)
        rows = ("entropy-coded", bits, RED), ("levels of 5 bits", 5, BLUE), ("float32", 32, GREY)
        for place, (name, value, colour) in enumerate(rows):
            panels[2].barh(place, value, 0.45, color=colour)
            panels[2].text(0, place + 0.3, f"{name}: {value:.2g}", fontsize=9, color=INK)
        panels[2].set_ylim(-0.4, 2.9)
        panels[2].set_xticks([])
        panels[2].spines["bottom"].set_visible(False)


if __name__ == "__main__":
    update(DOCS / "concepts_update.svg")
