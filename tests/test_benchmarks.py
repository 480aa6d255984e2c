"""The benchmark scripts run and write their results; how fast anything is, they only report."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedq import config
from tests import command

RUN_S = 900
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_"))


def test_all_are_found() -> None:
    names = {"codecs", "engine", "main_job", "memory", "scale", "tasks", "vectors"}
    names |= {"secure_aggregation"}
    assert names <= set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_run_writes_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = BENCHMARKS / f"{name}.py"
    done = command.run("--quick", "--out", tmp_path, script=script, timeout=RUN_S)
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


def test_help_says_what_is_measured() -> None:
    # All in one process, which imports torch once.
    code = f"""
import runpy, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
for name in {SCRIPTS}:
    sys.argv = [name, "--help"]
    print("==", name)
    try:
        runpy.run_path(f"{BENCHMARKS}/{{name}}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = done.stdout.split("== ")[1:]
    assert [page.split()[0] for page in pages] == SCRIPTS
    assert all("--quick" in page for page in pages)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A benchmark as a module, under a name of its own: Python has a ``codecs``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def module_of(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"the_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        spec.loader.exec_module(module)
        return module

    return module_of


@pytest.fixture
def frontier(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("codecs")


@pytest.mark.parametrize(("bias", "least", "most"), [(0.0, 0.97, 1.03), (3.0, 80, 100)])
def test_mean_of_all_clients_is_what_it_is(
    frontier: ModuleType, bias: float, least: float, most: float
) -> None:
    errors = np.random.default_rng(0).standard_normal((100, 4000)) + bias
    squares = np.square(errors)
    alike, uncertain = frontier._coherence(errors.sum(axis=0), squares.sum(axis=0), 100)
    one, mean = squares.sum() / 100, np.square(errors.mean(axis=0)).sum()
    assert np.isclose(one / 100 * (1 + 99 * alike), mean)
    assert least < 1 + 99 * alike < most
    assert bias or abs(alike) < 4 * uncertain


def test_limits_are_those_of_gaussian_vectors(frontier: ModuleType) -> None:
    assert frontier.limit(1.0, unbiased=False) == 0.25
    assert np.isclose(frontier.limit(1.0, unbiased=True), 1 / 3)


def test_a_finished_cell_is_known_again_wherever_it_ran(
    benchmark: Callable[[str], ModuleType],
) -> None:
    reproductions = benchmark("reproductions")
    asked = config.load(["task=images", "method=fedq"]).to_config()
    ran = {
        **asked,
        "clients": 50,
        "decode_threads": 1,
        "run_dir": "runs/7",
        "engine": {"workers": 1},
    }
    other = config.load(["task=images", "method=fedq", "downlink.margin=0.2"]).to_config()
    assert reproductions.digest(ran) == reproductions.digest(asked)
    assert reproductions.digest(other) != reproductions.digest(asked)
