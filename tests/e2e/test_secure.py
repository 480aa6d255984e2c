"""``fedq simulate secure_aggregation=...``: the masked run is the unmasked one, to the bit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.command import Command
from tests.e2e.test_simulate import SMALL as LONGER
from tests.e2e.test_simulate import fails, fedq, rounds, simulate, summary

SECAGG = "secure_aggregation=secagg"
SMALL = (*LONGER, "rounds=3")


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The same integers without masks."""
    directory = tmp_path_factory.mktemp("clear")
    return simulate(directory, "run", "secure_aggregation=clear", "rounds=3")


@pytest.mark.parametrize("workers", [1, 2])
def test_masks_change_nothing(clear: dict[str, object], workers: int, tmp_path: Path) -> None:
    masked = simulate(tmp_path, "run", SECAGG, "rounds=3", f"engine.workers={workers}")
    for key in ("model_sha256", "accuracy", "loss", "updates", "rejected"):
        assert masked[key] == clear[key]
    assert masked["uplink_bytes"] > clear["uplink_bytes"]  # type: ignore[operator]
    line = rounds(tmp_path / "run")[1]
    assert (line["replies"], line["received"], line["sampled"]) == (4, 4, 4)
    assert isinstance(line["train_loss"], float)
    for path in (tmp_path / "run" / "clients" / "secret").iterdir():
        assert json.loads(path.read_bytes())["session"] is None


@pytest.mark.slow
def test_ray_sums_the_same(clear: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    options = ("engine=ray", "engine.workers=2", "rounds=3")
    ray = simulate(tmp_path, "run", SECAGG, *options, new=True)
    assert ray["model_sha256"] == clear["model_sha256"]


def test_killed_in_a_phase_and_resumed_is_equal_to_uninterrupted(
    clear: dict[str, object], tmp_path: Path
) -> None:
    process = Command("simulate", *SMALL, SECAGG, "run_dir=cut", cwd=tmp_path)
    lines = tmp_path / "cut" / "rounds.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "cut" / "summary.json").exists(), "it finished before the kill"
    fedq("simulate", "resume=cut", cwd=tmp_path)
    assert summary(tmp_path / "cut")["model_sha256"] == clear["model_sha256"]


def test_a_robust_rule_over_groups(tmp_path: Path) -> None:
    options = ("secure_aggregation=grouped", "secure_aggregation.group_size=3")
    run = simulate(
        tmp_path, "run", *options, "aggregator=median", "clients_per_round=9", "rounds=1"
    )
    assert run["updates"] == 9
    assert run["rejected"] == {}


def test_too_few_clients_end_the_run_with_one_line(tmp_path: Path) -> None:
    message = "at least 3 clients per round"
    fails(tmp_path, 2, message, *SMALL, SECAGG, "clients_per_round=2")
    # Known only when the data is there: a fraction of clients that the partition decides.
    fails(tmp_path, 2, message, *SMALL, SECAGG, "clients=null", "clients_per_round=0.04")
    assert not list(tmp_path.rglob("summary.json"))


def test_seals_change_bytes_and_nothing_else(clear: dict[str, object], tmp_path: Path) -> None:
    sealed = simulate(tmp_path, "run", SECAGG, "sealed=true", "rounds=3")
    for key in ("model_sha256", "updates", "rejected"):
        assert sealed[key] == clear[key]
