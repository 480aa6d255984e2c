"""The benchmark scripts run and write their results; how fast anything is, they only report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_"))


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_all_are_found() -> None:
    assert {"codecs", "engine", "main_job", "memory", "scale"} <= set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_run_writes_results(name: str, tmp_path: Path) -> None:
    done = run(name, "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"date", "machine", "versions"} <= set(figures)
    assert figures["machine"]["cores"] >= 1
    assert set(figures["machine"]) == {"cpu", "cores", "memory_gb", "load_average"}
    page = (tmp_path / f"{name}.md").read_text()
    assert page.startswith("# ")
    assert "|---|" in page
    for text in (page, json.dumps(figures)):
        assert str(Path.home()) not in text
        assert str(tmp_path) not in text
        assert os.uname().nodename not in text.split()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_is_measured(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert "--quick" in done.stdout
