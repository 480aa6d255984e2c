"""Fleets, FedBuff and bit budgets as a user runs them: one result, whatever happens."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.command import Command
from tests.e2e.test_simulate import SMALL, fedq, rounds, simulate, summary

ASYNCHRONOUS = (
    "fleet=mixed_iot",
    "pacing=fedbuff",
    "pacing.buffer=3",
    "budget=dadaquant",
    "budget.patience=2",
    "codec=error_feedback",
    "codec.inner=uniform",
    "codec.inner.bits=4",
    "downlink_history=3",
    "quorum=0.3",
    "rounds=16",
)
#: All of a round's record that the wall clock does not decide.
CLOCKS = {"seconds", "evaluation_seconds"}


def facts(run: Path) -> list[dict[str, object]]:
    return [{k: r[k] for k in r if k not in CLOCKS} for r in rounds(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    simulate(directory, "run", *ASYNCHRONOUS, "engine.workers=2")
    return directory / "run"


def test_any_number_of_workers_gives_the_same_run(whole: Path, tmp_path: Path) -> None:
    again = simulate(tmp_path, "run", *ASYNCHRONOUS, "engine.workers=1")
    assert again["model_sha256"] == summary(whole)["model_sha256"]
    assert facts(tmp_path / "run") == facts(whole)


def test_time_and_energy_are_in_the_run_directory(whole: Path) -> None:
    for key in ("simulated_seconds", "joules"):
        assert summary(whole)[key] == pytest.approx(sum(r.get(key, 0) for r in rounds(whole)))  # type: ignore[arg-type, misc]
        assert summary(whole)[key] > 0  # type: ignore[operator]


def test_a_killed_run_resumes_to_the_same_model_time_and_energy(
    whole: Path, tmp_path: Path
) -> None:
    process = Command("simulate", *SMALL, *ASYNCHRONOUS, "run_dir=cut", cwd=tmp_path)
    lines = tmp_path / "cut" / "rounds.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (lines.exists() and lines.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists(), "it finished before the kill"
    fedq("simulate", "resume=cut", "engine.workers=1", cwd=tmp_path)
    cut = tmp_path / "cut"
    assert summary(cut)["model_sha256"] == summary(whole)["model_sha256"]
    assert facts(cut) == facts(whole)
