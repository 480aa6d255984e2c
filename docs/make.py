"""Make again what the documents show of this version and of results files: ``python docs/make.py``.

Each ``make_*.py`` here has ``pages()``, which yields pages as they should be, or ``draw()``, which
draws; a test compares the pages. What needs long runs is made by calling such a file itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))
MAKERS = sorted(path.stem for path in Path(__file__).parent.glob("make_*.py"))


def makers(what: str) -> Iterator[ModuleType]:
    """Yield the modules that have ``pages()``, or ``draw()``."""
    for name in MAKERS:
        module = import_module(name)
        if hasattr(module, what):
            yield module


def main() -> None:
    """Write all pages and pictures."""
    for maker in makers("pages"):
        for path, text in maker.pages():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for maker in makers("draw"):
        maker.draw()


if __name__ == "__main__":
    main()
