"""The page benchmarks/README.md: what each script measures, when and where it last did."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import _make
from _make import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the page of results."""
    rows = []
    for script in sorted(BENCHMARKS.glob("*.py")):
        found = BENCHMARKS / "results" / f"{script.stem}.json"
        if found.exists():
            figures = json.loads(found.read_text())
            cores = figures["machine"]["cores"]
            machine = f"{figures['machine']['cpu']}, {cores} core{'s' * (cores != 1)}"
            link = f"[{script.stem}](results/{script.stem}.md)"
            rows.append([link, _what(script), figures["date"], machine])
    text = (
        "# Results\n\n"
        "Each page and its JSON were written by the script of its name, in `benchmarks/`: "
        "`python benchmarks/main_job.py`.\n"
        "They name the machine, its load, versions and seeds; `--quick` only shows that a script "
        "runs.\n\n"
    )
    yield (
        BENCHMARKS / "README.md",
        text + _make.table(["results", "of", "date", "machine"], rows) + "\n",
    )


def _what(script: Path) -> str:
    """Return the first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`").rstrip(".")
