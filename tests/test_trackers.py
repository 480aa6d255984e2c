"""Trackers get what ``rounds.jsonl`` has, and a tracker that is down costs the run nothing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedq import available, build, config, simulation
from fedq.errors import ConfigError
from fedq.registry import _TABLES, register
from fedq.results import read_rounds, read_summary
from fedq.trackers import Tracker, tracking
from fedq.trackers.base import Sink

SMALL = ("data=digits", "model=mlp", "clients=4", "clients_per_round=2", "baseline=false")


def record(number: int, **more: Any) -> dict[str, Any]:
    return {"round": number, "accuracy": number / 4, "rejected": {"norm": 1}, **more}


def run(path: Path, *overrides: str) -> None:
    experiment = config.load([*SMALL, "engine.workers=1", *overrides])
    simulation.simulate(experiment.replace(run_dir=str(path)))


def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "run", "rounds=2", "trackers=[tensorboard]")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rounds = read_rounds(tmp_path / "run")
    for key in ("accuracy", "uplink_bytes", "train_loss"):
        kept = {event.step: event.value for event in events.Scalars(key)}
        expected = {r["round"]: r[key] for r in rounds if r[key] is not None}
        assert kept == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of SQLAlchemy
def test_mlflow_goes_on_with_the_run_that_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "run"
    path.mkdir()
    for numbers, ended in (((1, 2), {}), ((3,), {"accuracy": 0.75})):
        with tracking(["mlflow"], path, "mine", {"seed": 3}) as track:
            for number in range(1, numbers[0]):
                track(record(number, resumed=True))
            for number in numbers:
                track(record(number))
            if ended:
                track(ended)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (kept,) = client.search_runs([client.get_experiment_by_name("fedq").experiment_id])
    history = client.get_metric_history(kept.info.run_id, "accuracy")
    assert sorted((m.step, m.value) for m in history) == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert kept.data.params["seed"] == "3"
    assert (kept.info.run_name, kept.info.status) == ("mine", "FINISHED")
    assert kept.data.metrics["final/accuracy"] == 0.75


def test_wandb_stays_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with tracking(["wandb"], tmp_path, "mine", {"seed": 3}) as track:
        track(record(1))
        track({"accuracy": 0.5})
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


class _Broken(Sink):
    def __init__(self, when: str) -> None:
        self.when = when

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self.when == "log" and step == 2:
            raise ConnectionError("no route to host")

    def close(self, figures: Mapping[str, float]) -> None:
        if self.when == "close":
            raise ConnectionError("no route to host")


@pytest.mark.parametrize("when", ["open", "log", "close"])
def test_a_tracker_that_is_down_is_left_out(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(_TABLES, "tracker", dict(_TABLES["tracker"]))
    available("tracker")

    @register("tracker", "broken")
    class Broken(Tracker):
        extra: ClassVar[str] = "none"
        module: ClassVar[str] = "json"

        def open(self, path: Path, name: str, config: Mapping[str, Any]) -> Sink:
            if when == "open":
                raise ConnectionError("no route to host")
            return _Broken(when)

    with caplog.at_level(logging.WARNING, "fedq"):
        monkeypatch.setattr(logging.getLogger("fedq"), "propagate", True)
        run(tmp_path / "run", "rounds=3", "trackers=[broken]")
    told = "broken is left out: ConnectionError: no route to host"
    assert len({id(line) for line in caplog.records if line.getMessage() == told}) == 1
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert summary["rounds"] == 3


def test_a_tracker_that_is_not_installed_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with (
        pytest.raises(ConfigError, match=r"pip install 'fedq\[track-wandb\]'"),
        tracking(["wandb"], tmp_path, "mine", {}),
    ):
        pass
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        config.load(["trackers=[wandbb]"])


def test_every_tracker_names_what_it_needs() -> None:
    for name in available("tracker"):
        tracker = build("tracker", name)
        assert isinstance(tracker.module, str)
        assert tracker.extra == f"track-{name}"
