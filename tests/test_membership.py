"""Membership inference: known powers, controls that catch broken attacks, shadows that are kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

import fedq
from fedq.errors import ConfigError, FedqError
from fedq.robustness import _federation as federation
from fedq.robustness import _inference as inference
from fedq.robustness import _shadows, membership
from fedq.robustness._statistics import auc, tpr_at
from fedq.robustness.base import Work
from fedq.robustness.subject import Subject
from tests import leaking


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return leaking.subject(tmp_path_factory.mktemp("membership") / "run")


# --- scores of known worlds ------------------------------------------------------------------


def world(shift: float, shadows: int, rows: int) -> tuple[Any, Any, Any, Any]:
    """Signals N(difficulty + shift if trained on, 1): target, its members, shadows, theirs."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 3, rows)
    inside = inference.balanced(shadows, rows, rng)
    models = difficulty + shift * inside + rng.normal(size=inside.shape)
    members = rng.random(rows) < 0.5
    target = difficulty + shift * members + rng.normal(size=rows)
    return target, members, models, inside


def test_lira_reaches_the_power_of_the_likelihood_ratio() -> None:
    """The best test of N(m, 1) against N(m + 2, 1) with m known has power 1 - Phi(z - 2)."""
    target, members, models, inside = world(2.0, 128, 4000)
    for online in (True, False):
        scores = inference.lira(target, models, inside, online=online)
        for rate in (0.1, 0.01):
            found = tpr_at(rate, scores[members], scores[~members]).tpr.value
            best = norm.sf(norm.isf(rate) - 2)
            assert best - 0.08 < found < best + 0.05


def test_calibrated_attacks_beat_the_loss_where_examples_differ_in_difficulty() -> None:
    target, members, models, inside = world(2.0, 16, 4000)
    scores = membership.attacks(
        target[None], models[:, None], inside, np.arange(len(target), dtype=np.int64)
    )
    areas = {name: auc(s[members], s[~members]).value for name, s in scores.items()}
    assert areas["loss threshold"] < 0.72
    assert areas["LiRA online"] > 0.85
    assert areas["LiRA offline"] > 0.85
    assert areas["RMIA"] > 0.75


@pytest.mark.parametrize("shadows", [4, 16, 80])
def test_without_a_signal_no_attack_tells_members(shadows: int) -> None:
    """With few shadows, too: how well a side is known must not show in the score."""
    target, members, models, inside = world(0.0, shadows, 4000)
    scores = membership.attacks(
        target[None], models[:, None], inside, np.arange(len(target), dtype=np.int64)
    )
    for name, values in scores.items():
        assert auc(values[members], values[~members], 0.9999).holds(0.5), name


def test_every_example_is_in_half_of_the_shadows() -> None:
    inside = inference.balanced(6, 101, np.random.default_rng(0))
    assert (inside.sum(axis=0) == 3).all()
    with pytest.raises(ConfigError, match="even"):
        inference.balanced(5, 10, np.random.default_rng(0))


def test_an_example_without_shadows_on_a_side_has_no_score() -> None:
    target, _, models, inside = world(1.0, 4, 20)
    inside[:, 3] = True
    assert np.flatnonzero(np.isnan(inference.lira(target, models, inside))).tolist() == [3]
    assert np.isnan(inference.rmia(target, models, inside, np.arange(20)))[3]


def test_confidence_is_the_log_odds_and_bounded() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], np.float32))
    found = inference.confidence(logits, np.array([0, 2]))
    assert found == pytest.approx([np.log(0.7 / 0.3), np.log(0.1 / 0.9)], abs=1e-5)
    assert np.abs(inference.confidence(1e4 * logits, np.array([0, 2]))).max() == inference.MOST


def test_comparison_with_other_clients_finds_whose_rows_they_are() -> None:
    rng = np.random.default_rng(0)
    gains = rng.normal(rng.normal(0, 3, 100), 1, (10, 100))
    gains[4, :50] += 4
    found = inference.null_deviation(gains)[4]
    assert auc(found[:50], found[50:]).value > 0.95
    with pytest.raises(ConfigError, match="3 are needed"):
        inference.null_deviation(gains[:2])


# --- shadows -----------------------------------------------------------------------------------


def answers(accuracy: float) -> _shadows.Answers:
    nothing = np.zeros(3)
    return _shadows.Answers(
        nothing > 0, nothing, nothing, nothing[None], nothing[None], np.array(accuracy)
    )


def test_diverged_shadows_are_left_out() -> None:
    kept = _shadows.sound([answers(0.9), None, answers(0.2), answers(0.8), answers(0.95)])
    assert list(kept) == [0, 3, 4]
    with pytest.raises(FedqError, match="2 of 4 shadow federations diverged"):
        _shadows.sound([answers(0.9), answers(0.1), None, answers(0.9)])


def test_the_same_recipe_gives_the_run_s_model_and_shows_all_updates(
    subject: Subject, tmp_path: Path
) -> None:
    seen: list[Any] = []
    tensors = federation.federate(
        subject.experiment, subject.dataset, tmp_path / "f", 1, seen.append
    )
    assert all((tensors[name] == subject.tensors[name]).all() for name in subject.tensors)
    assert [one.round for one in seen] == [1, 2]
    assert [len(one.deltas) for one in seen] == [6, 6]
    trainer = federation.trainer_of(subject.experiment, subject.dataset)
    start = trainer.weights()
    assert np.abs(seen[0].weights - start).max() < 0.02, "the downlink rounds"
    assert not (tmp_path / "f").exists()


def test_a_split_keeps_rows_and_labels_together(subject: Subject) -> None:
    pool = federation.Pool(subject.dataset, 0)
    inside = np.random.default_rng(0).random(len(pool.labels)) < 0.5
    split = pool.split(inside)
    assert split.y_train.tolist() == pool.labels[inside].tolist()
    again = pool.inputs_of(split, inside)
    assert np.corrcoef(again.ravel(), pool.inputs.ravel())[0, 1] > 0.99


# --- the evaluation ----------------------------------------------------------------------------

SMALL = membership.Membership(shadows=4, checkpoints=1, observed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_an_evaluation_answers_four_questions_and_goes_on_after_a_kill(
    subject: Subject, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    assert SMALL.unsuitable(subject) == ""

    def killed(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SMALL.run(subject, Work(0, folder, 1, killed))
    runs: list[int] = []
    federate = federation.federate

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        return federate(*arguments)

    monkeypatch.setattr(federation, "federate", counted)
    found = leaking.by_name(
        SMALL.run(subject, Work(0, folder, 1, lambda done, of: steps.append((done, of))))
    )
    assert len(runs) == 3, "two shadows and the watched run; two shadows are kept"
    assert steps[-1] == (6, 6)
    for place in ("final model", "recipe", "rounds", "observed updates"):
        area = found[f"{place}, AUC"]
        assert area.bound == "lower"
        assert area.interval is not None
        assert area.twin is not None
        assert area.interval[0] <= area.value <= area.interval[1]  # type: ignore[operator]
        assert area.plot is not None
        assert area.plot.log
        rare = found[f"{place}, TPR at 0.1 % FPR"]
        assert rare.status == "withheld"
        assert rare.value is None
        assert "10000" in rare.reason
    gates = {gate.name: gate for gate in found["final model, AUC"].gates}
    assert gates["positive control"].passed
    assert gates["negative control"].passed
    repeated = {gate.name: gate for gate in found["observed updates, AUC"].gates}
    assert repeated["the run repeated"].passed
    again = leaking.by_name(SMALL.run(subject, Work(0, folder, 1)))
    assert again == found


def test_an_attack_that_sees_nothing_is_caught(
    subject: Subject, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0)

    def broken(logits: Any, labels: Any) -> Any:
        return noise.normal(size=len(labels))

    monkeypatch.setattr(_shadows, "confidence", broken)
    found = leaking.by_name(
        dataclasses.replace(SMALL, checkpoints=0, observed=0).run(subject, Work(1, folder, 1))
    )
    area = found["final model, AUC"]
    assert area.status == "invalid"
    assert "learnt" in area.reason


def test_a_difference_that_is_not_membership_is_caught(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model is surer of the run's training rows, whether it saw them or not."""

    def easier(self: _shadows.Shadows, seed: int, inside: Any) -> _shadows.Answers:
        rng = np.random.default_rng(seed)
        signals = rng.normal(size=len(inside)) + 2 * self.pool.members
        nothing = np.empty((0, len(inside)))
        return _shadows.Answers(inside, signals, signals, nothing, nothing, np.array(1.0))

    monkeypatch.setattr(_shadows.Shadows, "answers", easier)
    options = dataclasses.replace(SMALL, checkpoints=0, observed=0)
    found = leaking.by_name(options.run(subject, Work(2, tmp_path, 1)))
    assert found["final model, AUC"].status == "invalid"
    assert "training and test rows" in found["final model, AUC"].reason


def test_what_cannot_be_asked_is_said(subject: Subject) -> None:
    attacked = dataclasses.replace(
        subject,
        experiment=subject.experiment.replace(attack=fedq.build("attack", "sign_flip")),
    )
    assert "attacked" in SMALL.unsuitable(attacked)
    widths = fedq.build("quantization", "qat", widths=(8, 4))
    several = dataclasses.replace(
        subject, experiment=subject.experiment.replace(quantization=widths)
    )
    assert "several widths" in SMALL.unsuitable(several)
    few = dataclasses.replace(subject.dataset, y_test=subject.dataset.y_test[:10])
    assert "fewer than 20" in SMALL.unsuitable(dataclasses.replace(subject, dataset=few))


@pytest.mark.parametrize("options", [{"shadows": 3}, {"shadows": 2}, {"observed": -1}])
def test_a_wrong_budget_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        fedq.build("evaluation", "membership", **options)
