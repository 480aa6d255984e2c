"""A federation with hostile clients, as ``fedq simulate`` runs it: what falls and what stands."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.command import Command, run

FEDERATION = (
    "data=digits",
    "partition=iid",
    "model=mlp",
    "quantization=none",
    "clients=10",
    "clients_per_round=10",
    "baseline=false",
)
ALIE = ("rounds=6", "attack=alie", "attack.z=12", "attack.fraction=0.3")


RUN_S = 300


def simulate(cwd: Path, name: str, *overrides: str) -> dict[str, Any]:
    done = run("simulate", *FEDERATION, f"run_dir={name}", *overrides, cwd=cwd, timeout=RUN_S)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((cwd / name / "summary.json").read_text())
    return summary


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_under_alie_the_mean_falls_and_a_robust_rule_stands(tmp_path: Path) -> None:
    honest = simulate(tmp_path, "honest", "rounds=6")
    mean = simulate(tmp_path, "mean", *ALIE)
    robust = simulate(tmp_path, "robust", *ALIE, "aggregator=multi_krum", "aggregator.f=3")
    assert honest["accuracy"] > 0.85
    assert mean["accuracy"] < honest["accuracy"] - 0.2
    assert robust["accuracy"] > honest["accuracy"] - 0.05
    assert (honest["attackers"], mean["attackers"]) == (0, 18)
    assert mean["attack"] == "alie(fraction=0.3, z=12.0)"
    assert robust["aggregator"] == "multi_krum(f=3)"
    assert [record["attackers"] for record in rounds(tmp_path / "mean")] == [0] + [3] * 6


@pytest.mark.slow
def test_an_attacked_run_is_the_same_for_any_number_of_workers_and_after_a_kill(
    tmp_path: Path,
) -> None:
    options = ("rounds=4", "attack=bad_scale", "attack.fraction=0.3", "guard.strikes=2")
    one = simulate(tmp_path, "one", *options, "engine.workers=1")
    two = simulate(tmp_path, "two", *options, "engine.workers=2")
    assert one["model_sha256"] == two["model_sha256"]
    assert one["rejected"] == two["rejected"]
    process = Command(
        "simulate", *FEDERATION, "run_dir=cut", *options, cwd=tmp_path, own_session=True
    )
    log = tmp_path / "cut" / "rounds.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = run("simulate", "resume=cut", cwd=tmp_path, timeout=RUN_S)
    assert done.returncode == 0, done.stderr
    resumed = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert resumed["model_sha256"] == one["model_sha256"]
    assert resumed["rejected"] == one["rejected"]
    # Who sends garbage is not asked again, before and after the kill.
    assert [record["quarantined"] for record in rounds(tmp_path / "cut")] == [0, 0, 0, 3, 3]
    assert [record["sampled"] for record in rounds(tmp_path / "cut")] == [0, 10, 10, 7, 7]


@pytest.mark.parametrize("rule", ["fltrust", "monna"])
def test_rules_with_a_trusted_update_train_on_the_server(tmp_path: Path, rule: str) -> None:
    summary = simulate(tmp_path, "run", "rounds=2", f"aggregator={rule}", "attack=sign_flip")
    assert summary["rejected"] == {}
    assert summary["attackers"] == 4


def test_too_few_clients_for_a_rule_are_refused_with_the_formula(tmp_path: Path) -> None:
    options = ("run_dir=run", "rounds=4", "aggregator=bulyan", "aggregator.f=2")
    done = run("simulate", *FEDERATION, *options, cwd=tmp_path, timeout=RUN_S)
    assert done.returncode == 2
    assert "n >= 4 f + 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
