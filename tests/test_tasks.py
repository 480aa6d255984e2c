"""Federations of other tasks than classification, from the data to the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedq import config, simulation
from fedq.cli import main
from fedq.data.base import load
from fedq.export import runner
from fedq.report import equal_accuracy, find_runs, to_csv, to_markdown
from fedq.report.runs import Run

SHORT = ("rounds=2", "local_epochs=1", "engine.workers=1")
FEDERATIONS = {
    "mae": ("experiment=forecasting", "data.households=3", "data.days=40", "data.step=24"),
    "auc": ("experiment=anomaly_detection", "data.machines=3", "data.recordings=3", "data.tests=4"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for metric, options in FEDERATIONS.items():
        experiment = config.load([*options, *SHORT, f"run_dir={folder / metric}"])
        simulation.simulate(experiment, config.baseline_of(experiment))
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("metric", FEDERATIONS)
def test_a_summary_says_the_tasks_own_metric(runs: Path, metric: str) -> None:
    summary = read(runs / metric / "summary.json")
    assert summary["metric"] == metric
    assert summary["rejected"] == {}
    for key in (metric, f"float_{metric}", f"best_{metric}"):
        assert np.isfinite(summary[key])
    assert "accuracy" not in summary
    rounds = [json.loads(r) for r in (runs / metric / "rounds.jsonl").read_text().splitlines()]
    best = min if metric == "mae" else max
    assert summary[f"best_{metric}"] == best(record[metric] for record in rounds)
    reference = {"mae": "persistence_mae", "auc": "magnitude_auc"}[metric]
    assert summary[reference] > 0


def test_training_lowers_the_error(runs: Path) -> None:
    rounds = [json.loads(r) for r in (runs / "mae" / "rounds.jsonl").read_text().splitlines()]
    assert rounds[-1]["loss"] < rounds[0]["loss"]


def test_tables_tell_metrics_apart(runs: Path) -> None:
    found = find_runs([runs / metric for metric in FEDERATIONS])
    assert [run.metric.name for run in found] == ["mae", "mae", "auc", "auc"]
    alone, mixed = to_markdown(found[:2]), to_markdown(found)
    assert "| MAE |" in alone
    assert "| metric |" in mixed
    assert f"{found[2].score:.4g} AUC" in mixed
    assert "%" not in alone.splitlines()[2]
    heading = to_csv(found).splitlines()[0].split(",")
    assert {"mae", "float_mae", "auc", "float_auc"} <= set(heading)
    assert "accuracy" not in heading
    assert equal_accuracy(found[0], found[2]) is None  # other metrics do not compare


@pytest.mark.parametrize("metric", FEDERATIONS)
def test_the_report_draws_the_tasks_own_plot(
    runs: Path, metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs / metric)]) == 0
    assert (runs / metric / f"{metric}_vs_bytes.png").is_file()
    assert metric.upper() in capsys.readouterr().out


def test_lower_is_better_for_errors() -> None:
    def run(*errors: float) -> Run:
        sent = {"uplink_bytes": 100, "downlink_bytes": 0}
        rounds = tuple({"round": i, "mae": e, **sent} for i, e in enumerate(errors, 1))
        return Run(Path("x"), {}, rounds, {})

    good, poor = run(0.9, 0.5, 0.4), run(0.9, 0.8, 0.6)
    equal = equal_accuracy(good, poor)
    assert equal is not None
    assert equal.level == pytest.approx(0.6 / 0.99)  # 1 % above the reference's error
    assert (equal.run_bytes, equal.float_bytes) == (200, 300)


@pytest.mark.parametrize("exporter", ["onnx", "litert"])
@pytest.mark.parametrize("metric", FEDERATIONS)
def test_exports_pass_the_gate_and_answer_on_the_device(
    runs: Path, metric: str, exporter: str, tmp_path: Path
) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "litert": "ai_edge_litert"}[exporter])
    assert main(["export", str(runs / metric), "--to", exporter, "--out", str(tmp_path)]) == 0
    folder = tmp_path / exporter
    report, summary = read(folder / "export.json"), read(runs / metric / "summary.json")
    assert report["parity"]["agreement"] >= 0.99
    assert report["parity"]["agreement_with_training"] >= 0.99
    assert report["parity"]["float_operators"] == {}
    assert report[f"trained_{metric}"] == pytest.approx(summary[metric])
    assert report[metric] == pytest.approx(summary[metric], abs=0.02)
    dataset = load(config.load([*FEDERATIONS[metric], *SHORT]).data)
    np.savez(tmp_path / "d.npz", x_test=dataset.x_test, y_test=dataset.y_test)
    said = runner.classify(folder / report["file"], tmp_path / "d.npz")
    if metric == "mae":
        assert said["mae"] == pytest.approx(report["mae"], rel=1e-5)
        assert np.shape(said["values"]) == dataset.y_test.shape
    else:  # by examples, not by recordings and machines
        assert 0 <= said["auc"] <= 1
        assert len(said["errors"]) == len(dataset.x_test)


def test_a_run_of_your_own_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    y = 100 + 30 * x[:, 0]
    path = tmp_path / "own.npz"
    np.savez(path, x_train=x[:150], y_train=y[:150], x_test=x[150:], y_test=y[150:])
    options = ["data=npz", f"data.path={path}", "data.task=regression", "clients=3", "model=mlp"]
    more = ["learning_rate=0.05", "rounds=8", "baseline=false", "engine.workers=1"]
    experiment = config.load([*options, *more, f"run_dir={tmp_path / 'run'}"])
    (outcome,) = simulation.simulate(experiment)
    assert outcome.summary["mae"] < 10  # of a deviation of 30


def test_attacks_on_classes_need_classes(tmp_path: Path) -> None:
    options = [*FEDERATIONS["mae"], "rounds=1", "local_epochs=1", "attack=label_flip"]
    experiment = config.load([*options, "attack.fraction=0.5", f"run_dir={tmp_path / 'run'}"])
    outcome = simulation.run_experiment(experiment, tmp_path / "run")
    assert outcome.summary["rejected"]
