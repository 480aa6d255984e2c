"""The pictures of docs/studies.md: images, from the results of benchmarks/reproductions.py.

    python docs/make_studies.py

The screenshot needs playwright and a Chromium: `--chromium /usr/bin/chromium`, or playwright's own.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from fedq.report import Study, study_plots
from fedq.report.page import page

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"
PICTURES = {"pareto_bytes.svg": "studies_pareto.svg", "accuracy_vs_bytes.svg": "studies_curves.svg"}
SIZE = {"width": 1180, "height": 820}


def pictures(study: Study, out: Path) -> None:
    """Write the Pareto front and the curves."""
    with TemporaryDirectory() as folder:
        study_plots.write(study, Path(folder))
        for drawn, name in PICTURES.items():
            (out / name).write_bytes(Path(folder, drawn).read_bytes())


def screenshot(study: Study, out: Path, chromium: str | None) -> None:
    """Write what the page looks like, with the pointer on a curve."""
    from playwright.sync_api import sync_playwright

    with TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder, "report.html")
        file.write_text(page(study), encoding="utf-8")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_page(viewport=SIZE, color_scheme="light")
        shown.goto(file.as_uri())
        chart = shown.locator("#chart svg").first.bounding_box()
        shown.mouse.move(chart["x"] + 0.4 * chart["width"], chart["y"] + 0.3 * chart["height"])
        shown.screenshot(path=out / "studies_page.png")
        browser.close()


def main() -> None:
    """Write all pictures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--chromium", help="path of the browser")
    options.add_argument("--out", type=Path, default=DOCS)
    chosen = options.parse_args()
    sys.path.insert(0, str(BENCHMARKS))
    from reproductions import read, to_run

    cells = [cell for cell in read(BENCHMARKS / "results") if cell["task"] == "images"]
    study = Study.of(list(map(to_run, cells)))
    pictures(study, chosen.out)
    if find_spec("playwright"):
        screenshot(study, chosen.out, chosen.chromium)


if __name__ == "__main__":
    main()
