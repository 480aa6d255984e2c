"""Tables of the documents that quote benchmarks/results/: some rows and columns, as they are there.

Each stands in its page between ``<!-- NAME: ... -->`` and ``<!-- end of NAME -->``, under headings
that fit the page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import _make
from _make import DOCS, REPOSITORY

RULES = {
    "mean": "mean",
    "median": "median",
    "Multi-Krum": "multi_krum(f=3)",
    "geometric median": "geometric_median",
    "NNM + trimmed mean": "nearest_neighbour_mixing(f=3)",
}
DITHERED = "uniform(bits=5, rounding=dithered, scale=model)"


@dataclass(frozen=True)
class Quote:
    """A table of a page.

    Attributes:
      page: In ``docs/``.
      name: Of its place there.
      result: The benchmark.
      after: How the line begins that precedes its tables there, in the order of ``rows``.
      head: What the first column shows.
      columns: Heading here: heading there.
      rows: Per table, row here: row there; all rows as they are if empty.
    """

    page: str
    name: str
    result: str
    after: tuple[str, ...]
    head: str
    columns: dict[str, str]
    rows: tuple[dict[str, str], ...] = ()


QUOTES = (
    Quote(
        page="codecs.md",
        name="accuracy",
        result="tasks",
        after=("",),
        head="uplink",
        columns={
            "bits per parameter, of 32": "uplink, bits/parameter",
            "points": "to float, points",
        },
        rows=(
            {
                "`low_rank bits=0.05`": "low_rank(bits=0.05)",
                "`dtcq bits=0.025`": "dtcq(bits=0.025)",
                "`low_rank bits=0.0125`": "low_rank(bits=0.0125)",
                "`eden bits=0.05`": "eden(bits=0.05)",
                "`eden bits=0.0125`, diverges": "eden(bits=0.0125)",
                "`error_feedback` around `top_k`": "error_feedback(inner=top_k)",
                "`error_feedback` around `sign`": "error_feedback(inner=sign)",
                "`low_rank inner=rdo_tcq bits=0.1`, biased": "low_rank(inner=rdo_tcq)",
            },
        ),
    ),
    Quote(
        page="poisoning.md",
        name="attacks",
        result="poisoning",
        after=(f"**accuracy**, {DITHERED}", f"**backdoor success**, {DITHERED}"),
        head="attack",
        columns=RULES,
        rows=(
            {
                "none": "none",
                "ALIE z=1.5": "alie",
                "ALIE, tuned": "adaptive",
                "overclaim": "overclaim",
            },
            {
                "success of model replacement": "model_replacement",
                "success of the same, tuned": "adaptive(inner=model_replacement)",
            },
        ),
    ),
    Quote(
        page="poisoning.md",
        name="rounding",
        result="poisoning",
        after=("**A backdoor that quantization wakes up**",),
        head="model",
        columns={"accuracy, %": "accuracy, %", "success, %": "success, %"},
        rows=(
            {
                "float": "float",
                "int8": "int8",
                "int4": "int4",
                "int4, rounded at random": "int4, random rounding",
                "int4, rounded adaptively (AdaRound)": "int4, adaptive rounding",
            },
        ),
    ),
    Quote(
        page="robust_aggregation.md",
        name="attacks",
        result="byzantine",
        after=("",),
        head="attack",
        columns={
            name: name
            for name in (
                "mean, no guard",
                "mean",
                "mean, clip 2",
                "median",
                "Multi-Krum",
                "geometric median",
                "NNM + trimmed mean",
            )
        },
    ),
    Quote(
        page="robust_aggregation.md",
        name="costs",
        result="aggregators",
        after=("",),
        head="rule",
        columns={
            name: name
            for name in (
                "CPU, s",
                "memory / input",
                "ByzFL CPU, s",
                "ByzFL memory / input",
                "ByzFL fails",
                "times faster",
            )
        },
        rows=(
            {
                name: name
                for name in (
                    "trimmed mean",
                    "median",
                    "Multi-Krum",
                    "NNM + Multi-Krum",
                    "geometric median",
                    "NNM + trimmed mean",
                )
            },
        ),
    ),
    Quote(
        page="secure_aggregation.md",
        name="costs",
        result="secure_aggregation",
        after=("",),
        head="protocol",
        columns={
            "leave": "dropped",
            "client, ms": "client (ms)",
            "of it masks, ms": "of it masks (ms)",
            "server unmask, s": "unmask (s)",
            "uplink, bytes per parameter": "uplink (B per parameter)",
        },
    ),
)


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the pages with the figures that results files have now."""
    for page in dict.fromkeys(quote.page for quote in QUOTES):
        text = (DOCS / page).read_text()
        for quote in QUOTES:
            if quote.page == page:
                text = _make.with_made(text, quote.name, made(quote))
        yield DOCS / page, text
    page = DOCS / "privacy.md"
    yield page, _make.with_made(page.read_text(), "accuracy", privacy())


def privacy() -> str:
    """Return accuracy by mechanism and epsilon, in percent."""
    epsilons, shown = ("1", "3", "10"), []
    _, *body = table("privacy", "")
    for mechanism in dict.fromkeys(row[0] for row in body if row[1]):
        rows = {row[1]: row for row in body if row[0] == mechanism}
        spread = [
            f"{100 * float(rows[e][3]):.1f} +- {100 * float(rows[e][4]):.1f} %" for e in epsilons
        ]
        bits = sorted({f"{float(row[5]):.1f}" for row in rows.values()}, key=float)
        shown.append([mechanism, *spread, " to ".join(dict.fromkeys((bits[0], bits[-1])))])
    head = ["mechanism", *(f"epsilon {e}" for e in epsilons), "uplink bits per parameter"]
    return _make.table(head, shown, right=1)


def made(quote: Quote) -> str:
    """Return a quoted table."""
    shown = []
    for place, after in enumerate(quote.after):
        head, *body = table(quote.result, after)
        columns = [head.index(name) for name in quote.columns.values()]
        chosen = quote.rows[place] if quote.rows else {row[0]: row[0] for row in body}
        for here, there in chosen.items():
            shown += [[here, *(row[i] for i in columns)] for row in body if row[0] == there]
    return _make.table([quote.head, *quote.columns], shown, right=1)


def table(result: str, after: str) -> list[list[str]]:
    """Return the first table of a results page that follows a line, its head first."""
    lines = (REPOSITORY / "benchmarks" / "results" / f"{result}.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(after))
    start = next(i for i in range(start, len(lines)) if lines[i].startswith("|"))
    found = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    head, _, *body = ([cell.strip() for cell in line[1:-1].split("|")] for line in found)
    return [head, *body]
