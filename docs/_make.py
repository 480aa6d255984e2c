"""What the scripts that make parts of the documents have in common."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
#: The colours of pictures, those of Okabe and Ito 2008 that all can tell apart.
BLUE, RED, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#262626"


@contextmanager
def picture(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure, and write it as SVG that is the same each time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor="white")
    FigureCanvasAgg(figure)
    yield figure
    with matplotlib.rc_context({"svg.hashsalt": "fedq", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def with_made(page: str, name: str, made: str) -> str:
    """Return a page with what it has from ``<!-- NAME: -->`` to ``<!-- end of NAME -->`` anew."""
    whole = re.compile(rf"(<!-- {name}: [^>]* -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
    page, times = whole.subn(lambda found: found[1] + made + found[2], page)
    if times != 1:
        raise SystemExit(f"the page has {times} places for '{name}', and needs one")
    return page


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: int | None = None) -> str:
    """Return a Markdown table; columns from ``right`` on hold numbers."""
    numbers = len(head) if right is None else right
    lines = [_row(head), "|" + "---|" * numbers + "---:|" * (len(head) - numbers)]
    return "\n".join([*lines, *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Return a cell whose bars are no borders, which Markdown's dialects write unlike in code."""
    text = re.sub(r"`([^`]*\|[^`]*)`", lambda code: f"<code>{html.escape(code[1])}</code>", text)
    return text.replace("|", "&#124;")


def slug(heading: str) -> str:
    """Return the fragment that Git hosts give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
