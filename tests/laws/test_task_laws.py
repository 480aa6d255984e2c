"""Laws of every registered task, and of the metrics that models are judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

import fedq
from fedq.data.base import Dataset
from fedq.errors import ConfigError
from fedq.metrics import ACCURACY, AUC, MAE, METRICS, metric_of, roc_auc
from fedq.registry import from_config, lookup, table, to_config
from fedq.tasks import Task
from fedq.training import Trainer
from fedq.training_config import TrainingConfig

TASKS = [
    pytest.param(fedq.build("task", name, **options), id=f"{name}-{options}")
    for name in table("task")
    for options in lookup("task", name).examples
]
N = 24


def truths_of(task: Task, rng: np.random.Generator, n: int = N) -> np.ndarray:
    return {
        "classification": lambda: np.arange(n) % 6,
        "regression": lambda: rng.normal(size=(n, 6)).astype(np.float32),
        "reconstruction": lambda: np.stack([np.arange(n) % 2, np.arange(n), np.arange(n) // 12], 1),
    }[task.name]()


def batch(task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(5)
    x, outputs = rng.normal(size=(2, N, 6)).astype(np.float32)
    truths = task.truths(x, truths_of(task, rng))
    return torch.from_numpy(outputs), torch.from_numpy(x), torch.from_numpy(truths)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_its_configuration(task: Task) -> None:
    assert from_config("task", to_config(task)) == task
    assert task.metric in METRICS


@pytest.mark.parametrize("task", TASKS)
def test_the_mean_loss_is_the_sum_over_examples(task: Task) -> None:
    outputs, inputs, truths = batch(task)
    total = task.loss(outputs, inputs, truths, "sum")
    torch.testing.assert_close(task.loss(outputs, inputs, truths) * N, total)
    parts = [task.loss(outputs[i : i + 1], inputs[i : i + 1], truths[i : i + 1]) for i in range(N)]
    torch.testing.assert_close(sum(parts), total)


@pytest.mark.parametrize("task", TASKS)
def test_a_step_against_the_gradient_lowers_the_loss(task: Task) -> None:
    outputs, inputs, truths = batch(task)
    outputs.requires_grad_()
    before = task.loss(outputs, inputs, truths)
    (slope,) = torch.autograd.grad(before, outputs)
    assert task.loss(outputs - slope, inputs, truths) < before


@pytest.mark.parametrize("task", TASKS)
def test_divergence_is_zero_of_the_teacher_itself(task: Task) -> None:
    outputs, inputs, _ = batch(task)
    assert task.divergence(outputs, outputs).abs() < 1e-6
    assert task.divergence(outputs, inputs) > 0


@pytest.mark.parametrize("task", TASKS)
def test_a_trainer_learns_it_and_evaluates_in_any_batches(task: Task) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    y = {
        "classification": lambda: x.argmax(1),
        "regression": lambda: (20 * x - 3).astype(np.float32),
        "reconstruction": lambda: truths_of(task, rng, 60),
    }[task.name]()
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(6, 6)), task)
    config = TrainingConfig(local_epochs=30, batch_size=10, learning_rate=0.1)
    before = trainer.evaluate(x, y)
    trained = trainer.train(x, y, config, seed=0)
    after = trainer.evaluate(x, y, batch_size=7)
    assert trained.loss < before.loss
    assert after.loss < before.loss
    assert after.score == pytest.approx(trainer.evaluate(x, y).score)
    if task.name != "reconstruction":  # here anomalies are no anomalies
        assert task.metric.best([before.score, after.score]) == after.score
    with torch.no_grad():
        outputs = trainer.model(torch.from_numpy(x)).numpy()
    assert task.evaluate(outputs, x, y) == pytest.approx(after.score)


@pytest.mark.parametrize("task", TASKS)
def test_truths_of_another_task_are_refused(task: Task) -> None:
    x = np.zeros((4, 6), np.float32)
    wrong: Any = np.zeros((4, 6)) if task.dimensions == 1 else np.zeros(4)
    with pytest.raises(ConfigError, match=f"task={task.name}"):
        task.truths(x, wrong)
    with pytest.raises(ConfigError, match="n > 0"):
        task.truths(x[:0], wrong[:0])


@pytest.mark.parametrize("divisor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_regression_needs_a_scale(divisor: float) -> None:
    with pytest.raises(ConfigError, match=r"task\.divisor"):
        fedq.build("task", "regression", divisor=divisor)


# --- metrics -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=2, max_size=60))
def test_the_area_under_the_curve_is_scikit_learns(pairs: list[tuple[bool, int]]) -> None:
    positive, scores = (np.array(column) for column in zip(*pairs, strict=True))
    if positive.all() or not positive.any():
        assert np.isnan(roc_auc(positive, scores))
    else:
        assert roc_auc(positive, scores) == pytest.approx(roc_auc_score(positive, scores))


def test_reconstruction_judges_recordings_machine_by_machine() -> None:
    """Two machines of very different loudness; frames of a recording count together."""
    rng = np.random.default_rng(2)
    rows, errors = [], []
    for machine, level in ((0, 1.0), (1, 100.0)):
        for recording in range(20):
            anomalous = recording % 2
            rows += [(anomalous, 100 * machine + recording, machine)] * 5
            errors += list(level * (1 + 0.4 * anomalous + rng.normal(size=5)))
    truths, judged = np.array(rows), np.array(errors)
    task = fedq.build("task", "reconstruction")
    areas = [
        roc_auc_score(
            truths[truths[:, 2] == machine][::5, 0],
            judged[truths[:, 2] == machine].reshape(-1, 5).mean(1),
        )
        for machine in (0, 1)
    ]
    order = rng.permutation(len(truths))
    assert task.score(judged[order], truths[order]) == pytest.approx(np.mean(areas))


def test_a_metric_knows_its_direction() -> None:
    assert (MAE.best([1, 2]), MAE.worst([1, 2]), MAE.part(9.9, 0.99)) == (1, 2, 10)
    assert (AUC.best([1, 2]), AUC.worst([1, 2])) == (2, 1)
    assert metric_of({"loss": 1.0, "accuracy": 0.5}) is ACCURACY
    assert metric_of({"loss": 1.0, "mae": None}) is None


# --- data sets of other tasks --------------------------------------------------------------------


def of(y: np.ndarray, y_test: np.ndarray, task: Any, n: int = 6) -> Dataset:
    x = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    return Dataset.of(x, y, x[: len(y_test)], y_test, kind="features", task=task)


def test_a_regressions_numbers_stay_in_their_units() -> None:
    y = np.array([1.0, 2, 3, 4, 5, 9])
    data = of(y, y[:3], "regression")
    assert (data.outputs, data.classes) == (1, 0)
    assert np.array_equal(data.y_train[:, 0], y)
    assert data.task == {"name": "regression", "offset": 4.0, "divisor": pytest.approx(y.std())}
    assert np.array_equal(data.strata, np.zeros(6))


def test_a_reconstruction_is_as_wide_as_its_input() -> None:
    data = of(np.zeros(6, int), np.array([0, 1, 0]), "reconstruction")
    assert (data.outputs, data.classes) == (4, 0)
    assert data.y_test.tolist() == [[0, 0, 0], [1, 1, 0], [0, 2, 0]]


@pytest.mark.parametrize(
    ("task", "y", "y_test", "message"),
    [
        ("regression", np.ones(6), np.ones(2), "constant"),
        ("regression", np.arange(6) / 0.5, np.full(2, np.nan), "NaN"),
        ("regression", np.arange(6), np.zeros((2, 3)), "must be equal"),
        ("regression", np.array(list("abcdef")), np.zeros(2), "must hold numbers"),
        ("regression", np.zeros((6, 2, 2)), np.zeros(2), "must have shape"),
        ("reconstruction", np.zeros(6, int), np.zeros(2, int), "both normal examples"),
        ("reconstruction", np.eye(6, dtype=int)[0], np.array([0, 1]), "normal examples alone"),
        ("reconstruction", np.zeros(6, int), np.array([0, 2]), "1 for anomalies"),
        ("reconstruction", np.zeros(6), np.array([0, 1]), "must hold integers"),
        ("reconstruction", np.zeros((6, 2), int), np.array([0, 1]), "must have shape"),
    ],
)
def test_bad_truths_are_one_clear_error(
    task: str, y: np.ndarray, y_test: np.ndarray, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        of(y, y_test, task)
