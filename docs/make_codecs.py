"""What is made for docs/codecs.md: the table of codecs, and the picture of how ``dtcq`` works.

``python docs/make_codecs.py`` runs ``fedq codecs`` (a minute) and keeps its picture.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import _make
import numpy as np
from _make import BLUE, DOCS, GREY, INK, RED

from fedq import build, reference, registry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = DOCS / "codecs.md"


# --- table ---------------------------------------------------------------------------------------


def table() -> str:
    """Return the registered codecs as a Markdown table."""
    rows = []
    for name, cls in registry.table("codec").items():
        codecs = [build("codec", name, **options) for options in cls.examples]  # type: ignore[attr-defined]
        promises = {codec.unbiased for codec in codecs}
        unbiased = "by options" if len(promises) == 2 else "yes" if promises.pop() else "no"
        options = ", ".join(
            f"`{option.name}`" if option.default is None else f"`{option.name}={option.default}`"
            for option in reference.entry("codec", name).options
        )
        example = f"`{registry.describe(codecs[-1])}`"
        rows.append([f"`{name}`", reference.title(cls), unbiased, options, example])
    return _make.table(
        ["codec", "what, and whose", "unbiased", "options and defaults", "example"], rows
    )


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the page with the table of this version."""
    yield PAGE, _make.with_made(PAGE.read_text(), "table", table())


def draw() -> None:
    """Draw what needs no measuring."""
    idea(DOCS / "codecs_idea.svg")


# --- pictures ------------------------------------------------------------------------------------


def idea(path: Path) -> None:
    """Draw what ``dtcq`` is made of: dither, trellis, steps."""
    titles = (
        "1  Dither: the grid moves, the error forgets x",
        "2  Trellis: eight states, two branches each",
        "3  Steps: the cube root of small scales",
    )
    with _make.picture(path, (12, 4.6)) as figure:
        panels = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
        figure.subplots_adjust(left=0.02, right=0.985, bottom=0.13, top=0.88, wspace=0.2)
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold", pad=10)
            axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        _draw_dither(panels[0])
        _draw_trellis(panels[1])
        _draw_steps(panels[2])


def _draw_dither(axes: Axes) -> None:
    x, rows = 0.62, (0.15, 0.55, 0.85, 0.35)
    for row, u in enumerate(rows):
        y = len(rows) - row
        axes.plot([-2.4, 2.9], [y, y], color="#E6E6E6", linewidth=1, zorder=1)
        points = np.arange(-3, 4) - u
        points = points[(points > -2.4) & (points < 2.9)]
        axes.plot(points, np.full(points.size, y), "o", color=BLUE, markersize=5, zorder=3)
        near = points[np.argmin(np.abs(points - x))]
        axes.annotate(
            "", (near, y), (x, y), arrowprops={"arrowstyle": "-|>", "color": RED, "linewidth": 1.6}
        )
        axes.text(-2.5, y, f"u = {u}", ha="right", va="center", fontsize=9, color=GREY)
    axes.plot([x, x], [0.4, len(rows) + 0.5], "--", color=INK, linewidth=1, zorder=2)
    axes.text(x, len(rows) + 0.58, "x", ha="center", fontsize=10, color=INK)
    axes.text(
        0.1, -0.25, "the client rounds x on a grid that the seed moves, the server\n"
        "knows where. Over seeds the error has mean zero and one\n"
        "law for every x: n clients leave 1/n of it", ha="center", va="center", fontsize=8.5,
        color=INK, linespacing=1.5,
    )  # fmt: skip
    axes.set_xlim(-3.6, 3.2)
    axes.set_ylim(-0.9, 5)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_trellis(axes: Axes) -> None:
    from fedq.codecs._trellis import transitions

    steps, after = 4, transitions(8)
    path, state = [0], 0
    for branch in (1, 0, 1, 1):
        state = int(after[state, branch])
        path.append(state)
    for step in range(steps):
        for start in range(8):
            for branch in (0, 1):
                end = int(after[start, branch])
                chosen = path[step] == start and path[step + 1] == end
                axes.plot(
                    [step, step + 1], [-start, -end], "-" if branch == 0 else "--", zorder=2,
                    color=RED if chosen else "#BDBDBD", linewidth=2.4 if chosen else 0.9,
                )  # fmt: skip
    for step in range(steps + 1):
        axes.plot([step] * 8, -np.arange(8), "o", color=INK, markersize=4.5, zorder=3)
    for start in range(8):
        subset = "even" if start % 2 == 0 else "odd"
        axes.text(-0.15, -start, subset, ha="right", va="center", fontsize=8.5, color=GREY)
    axes.text(
        steps / 2, -8.35, "a state allows even or odd levels, and the level sent chooses\n"
        "the branch. The nearest path (Viterbi 1967) is 1.08 dB\n"
        "nearer than rounding, of 1.53 dB that exist",
        ha="center", va="center", fontsize=8.5, color=INK, linespacing=1.5,
    )  # fmt: skip
    axes.set_xlim(-0.75, steps + 0.2)
    axes.set_ylim(-9.3, 0.5)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_steps(axes: Axes) -> None:
    sigma = np.geomspace(0.05, 20, 200)
    step = np.clip(sigma, None, 1) ** (1 / 3)
    axes.loglog(sigma, step, color=BLUE, linewidth=2.2)
    axes.loglog(sigma, np.ones(200), "--", color=GREY, linewidth=1)
    axes.axvline(1, color="#E6E6E6", linewidth=1)
    axes.text(
        1.4,
        0.5,
        "small coordinates:\nstep ~ σ^(1/3), so that\nmany of them do not\nadd up to much noise",
        fontsize=9,
    )
    axes.text(1.3, 0.9, "one step for all:\nreverse water-filling", fontsize=9, va="top")
    axes.set_xlabel("scale σ of row and column, in steps", fontsize=9)
    axes.set_ylabel("step", fontsize=9)
    axes.set_ylim(0.33, 1.15)
    axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.set_yticks([0.4, 0.6, 0.8, 1], ["0.4", "0.6", "0.8", "1"])
    axes.tick_params(which="both", length=0, labelsize=8.5)
    axes.minorticks_off()


def frontier(path: Path) -> None:
    """Measure codecs and keep the picture, a minute's work."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedq.cli", "codecs", "--out", folder]
        subprocess.run(command, check=True)
        path.write_bytes((Path(folder) / "codecs.svg").read_bytes())


if __name__ == "__main__":
    frontier(DOCS / "codecs_frontier.svg")
