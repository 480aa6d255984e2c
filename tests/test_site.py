"""The site builds, with all links sound, and nothing of it comes from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
pytest.importorskip("material")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_pages_are_where_they_lie_in_the_repository(site: Path) -> None:
    for page in ("", "docs/codecs", "docs/reference/codec", "benchmarks/results/main_job"):
        assert (site / page / "index.html").is_file(), page
    assert "bit/param" in (site / "index.html").read_text()
    assert (site / "docs/concepts_round.svg").is_file()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//[^>]*>"""
        r"""|<link[^>]*(?:stylesheet|preconnect|icon|preload)[^>]*(?:https?:)?//[^>]*>"""
        r"""|url\(["']?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*;"""
    )
    for path in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]:
        found = fetched.search(path.read_text())
        assert found is None, f"{path.relative_to(site)}: {found and found[0][:200]}"


def test_markdown_is_rendered(site: Path) -> None:
    """What this dialect of Markdown does not know would stay as it was written."""
    for path in site.rglob("index.html"):
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        for raw in ("|---", "```", "](", "<p>- ", "<p>* ", "\n- "):
            assert raw not in text, f"{path.relative_to(site)} has a raw {raw!r}"
