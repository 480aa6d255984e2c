"""One hypothesis profile, the same examples on every run; and a browser, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium of playwright; tests of pages are skipped without."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def problems() -> list[str]:
    """What a page said on its console, and its errors; see :func:`tab`."""
    return []


@pytest.fixture
def tab(browser: Any, problems: list[str]) -> Any:
    """A tab as wide as a phone."""
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text))
    return opened
