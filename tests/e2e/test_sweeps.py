"""``fedq simulate -m`` as a user runs it: in parallel, killed, gone on with, grown, and wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedq import manifest
from tests.command import Command, run

SMALL = (
    *("data=digits", "model=mlp", "quantization=none", "clients=6", "clients_per_round=3"),
    *("local_epochs=1", "rounds=2"),
)
GRID = ("-m", *SMALL, "codec=sign,fp16", "seed=0,1")


def fedq(*arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = run(*arguments, cwd=cwd, timeout=300)
    assert done.returncode == status, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def models(sweep: Path) -> dict[str, str]:
    """The model of each cell."""
    return {
        str(path.parent.relative_to(sweep)): json.loads(path.read_text())["model_sha256"]
        for path in sorted(sweep.rglob("summary.json"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fedq("simulate", *GRID, "run_dir=sweep", cwd=folder)
    return folder / "sweep"


def test_cells_and_one_baseline_per_seed(whole: Path) -> None:
    assert set(models(whole)) == {"1", "2", "3", "4", "baselines/1", "baselines/2"}
    for number in "1234":
        found = manifest.read(whole / number)
        assert found is not None
        baseline = manifest.read(whole / number / found["baseline"])
        assert baseline is not None
        assert baseline["seeds"]["seed"] == found["seeds"]["seed"]
        assert found["config_sha256"] == manifest.fingerprint(found["config"])
        (session,) = found["sessions"]
        assert session["versions"]["fedq"]
        assert session["hardware"]["cores"]
        assert set(session["git"]) == {"fedq", "working_directory"}


def test_a_cell_is_the_run_alone(whole: Path, tmp_path: Path) -> None:
    fedq("simulate", *SMALL, "codec=fp16", "seed=1", "run_dir=alone", cwd=tmp_path)
    alone = models(tmp_path / "alone")
    assert alone["."] == models(whole)["4"]
    baseline = manifest.read(whole / "4")
    assert baseline is not None
    assert alone["baseline"] == models(whole)[Path("4", baseline["baseline"]).as_posix()[5:]]


def test_the_same_again_runs_nothing_and_more_adds_cells(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("summary.json")}
    fedq("simulate", *GRID[:-1], "seed=1,2", "run_dir=sweep", cwd=whole.parent)
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("summary.json")}
    assert before.items() <= after.items()
    added = {str(path.parent.relative_to(whole)) for path in after.keys() - before.keys()}
    assert added == {"5", "6", "baselines/3"}


def interrupted(cwd: Path, stop: signal.Signals, *arguments: str) -> str:
    """Start a sweep, stop it when some cell has ended a round, and return what it complained of."""
    process = Command("simulate", *arguments, cwd=cwd, own_session=True)
    sweep = cwd / "sweep"
    wait_for(lambda: any(f.read_bytes().count(b"\n") > 2 for f in sweep.rglob("rounds.jsonl")))
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does
    else:
        process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-stop if stop == signal.SIGKILL else 130)
    return errors


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


LONG = ("-m", *SMALL[:-1], "rounds=25", "codec=sign,fp16", "baseline=false", "run_dir=sweep")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fedq("simulate", *LONG, cwd=folder)
    return models(folder / "sweep")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_goes_on(
    tmp_path: Path, stop: signal.Signals, uninterrupted: dict[str, str]
) -> None:
    errors = interrupted(tmp_path, stop, *LONG)
    if stop != signal.SIGKILL:
        assert "continue with fedq simulate -m resume=sweep" in errors
    sweep = tmp_path / "sweep"
    wait_for(lambda: not alive(sweep))
    begun = {path.parent.name: len(path.read_text().splitlines()) for path in lines(sweep)}
    assert any(1 < count < 26 for count in begun.values()), begun
    fedq("simulate", "-m", "resume=sweep", cwd=tmp_path)
    assert models(sweep) == uninterrupted
    sessions = [len((manifest.read(sweep / name) or {})["sessions"]) for name in begun]
    assert max(sessions) == 2


def lines(sweep: Path) -> list[Path]:
    return list(sweep.rglob("rounds.jsonl"))


def alive(sweep: Path) -> bool:
    """Whether a process still holds a cell's lock."""
    held = subprocess.run(
        ["sh", "-c", f"for f in {sweep}/*/.lock; do flock -n $f true || exit 1; done"], check=False
    )
    return held.returncode == 1


def test_a_bad_cell_costs_itself_alone(tmp_path: Path) -> None:
    done = fedq(
        "simulate", "-m", *SMALL[:-1], "rounds=4", "baseline=false", "learning_rate=0.1,1e30",
        "run_dir=sweep", cwd=tmp_path, status=1,
    )  # fmt: skip
    assert set(models(tmp_path / "sweep")) == {"1"}
    assert re.search(r"^fedq: sweep/2: .*diverged", done.stderr, re.MULTILINE)
    assert "[2/2]" in done.stdout


def test_a_cell_whose_process_dies_costs_itself_alone(tmp_path: Path) -> None:
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, signal, multiprocessing\n"
        "from fedq.codecs.sign import Sign\n"
        "from fedq.registry import register\n"
        "@register('codec', 'killer')\n"
        "class Killer(Sign):\n"
        "    '''Kills the server's process.'''\n"
        "    def _decode(self, body, layout, seed):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = fedq(
        "simulate", "-m", *SMALL, f"plugins=[{killer}]", "baseline=false", "codec=killer,sign",
        "run_dir=sweep", cwd=tmp_path, status=1,
    )  # fmt: skip
    assert set(models(tmp_path / "sweep")) == {"2"}
    assert "sweep/1: its process died (signal 9" in done.stderr


def test_combinations_that_make_no_experiment(tmp_path: Path) -> None:
    grid = ("-m", *SMALL, "baseline=false", "codec=uniform", "codec.bits=4,99", "run_dir=sweep")
    done = fedq("simulate", *grid, cwd=tmp_path, status=2)
    assert "codec.bits=99" in done.stderr
    assert "--keep-going" in done.stderr
    assert not list(tmp_path.iterdir())
    fedq("simulate", *grid, "--keep-going", cwd=tmp_path, status=1)
    assert set(models(tmp_path / "sweep")) == {"1"}


def test_wrong_use(tmp_path: Path, whole: Path) -> None:
    def says(message: str, *arguments: str) -> None:
        assert message in fedq("simulate", *arguments, cwd=tmp_path, status=2).stderr

    says("add -m", *SMALL, "--jobs", "2")
    says("at least 1", "-m", *SMALL, "--jobs", "0", "run_dir=a")
    says("choose fewer", "-m", *SMALL, "engine.workers=1000", "--jobs", "2", "run_dir=b")
    says("there is no run directory", "resume=nowhere")
    says("holds no sweep", "-m", "resume=nowhere")
    says("holds a single run", "-m", *SMALL, f"run_dir={whole / '1'}")
    says("no end of values", "-m", *SMALL, "learning_rate=interval(0.1,0.2)")
    says("nothing to search", "-m", *SMALL, "hydra/sweeper=optuna")


def test_a_search_with_optuna(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = ("codec=uniform", "codec.bits=range(2,9,2)", "learning_rate=tag(log,interval(0.01,1))")
    trials = ("-m", *SMALL, "hydra/sweeper=optuna", *space, "run_dir=sweep")
    fedq("simulate", *trials, "hydra.sweeper.n_trials=3", cwd=tmp_path)
    assert set(models(tmp_path / "sweep")) == {"1", "2", "3"}
    fedq("simulate", *trials, "hydra.sweeper.n_trials=4", cwd=tmp_path)
    assert set(models(tmp_path / "sweep")) == {"1", "2", "3", "4"}
