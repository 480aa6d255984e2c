"""Take the picture of ``fedq watch`` that the documents show: ``python docs/make_watch.py RUN``.

Needs ``pip install playwright`` and a Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fedq.watch import serving

PICTURE = Path(__file__).with_name("watch.png")


def main(run: str) -> None:
    """Write the picture of a run."""
    from playwright.sync_api import sync_playwright

    with serving(run) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport={"width": 1180, "height": 800})
        tab.goto(address)
        tab.wait_for_selector("#by-bytes polyline")
        tab.screenshot(path=PICTURE, full_page=True)
        browser.close()
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main(sys.argv[1])
