"""Property inference and the privacy audit: they see what is there, and their controls work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedq
from fedq.errors import ConfigError
from fedq.robustness import property_inference
from fedq.robustness.base import Work
from fedq.robustness.dp_audit import DpAudit, _fitted
from fedq.robustness.property_inference import PropertyInference
from fedq.robustness.subject import Subject
from tests import leaking

PRIVATE = ("privacy=gaussian", "privacy.noise_multiplier=1.0", "privacy.delta=0.001")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return leaking.subject(tmp_path_factory.mktemp("properties") / "run")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    pytest.importorskip("dp_accounting")
    return leaking.subject(tmp_path_factory.mktemp("private") / "run", *PRIVATE)


def test_a_client_s_classes_are_in_its_update(subject: Subject, tmp_path: Path) -> None:
    options = PropertyInference(clients=12, simulated=40)
    found = leaking.by_name(options.run(subject, Work(0, tmp_path)))["over-represented classes"]
    assert found.status == "measured"
    assert found.value is not None
    assert found.value > 0.75


def test_features_without_information_are_caught(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    def useless(self: Any, delta: Any) -> Any:
        return rng.normal(size=20)

    monkeypatch.setattr(property_inference._Properties, "_features", useless)
    options = PropertyInference(clients=12, simulated=40)
    found = leaking.by_name(options.run(subject, Work(0, tmp_path)))["over-represented classes"]
    assert found.status == "invalid"
    assert "is needed" in found.reason


def test_an_honest_mechanism_passes_its_audit(private: Subject, tmp_path: Path) -> None:
    found = leaking.by_name(DpAudit(canaries=200).run(private, Work(0, tmp_path)))["canaries"]
    assert found.status == "measured"
    assert found.interval is not None
    claim = found.details["accountant, of these releases"]
    assert found.interval[0] <= claim
    assert found.value is not None
    assert found.value > 0.3 * claim, "or the audit sees nothing"


def test_a_promise_that_the_noise_does_not_keep_has_failed(
    private: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mechanism adds a fifth of the noise that its accountant counts."""
    from fedq.privacy import gaussian

    honest = gaussian.noisy_sum

    def weak(total: Any, bound: float, sigma: float, *rest: Any) -> Any:
        return honest(total, bound, sigma / 5, *rest)

    monkeypatch.setattr(gaussian, "noisy_sum", weak)
    found = leaking.by_name(DpAudit(canaries=200).run(private, Work(0, tmp_path)))["canaries"]
    assert found.status == "failed"
    assert "the audit proves epsilon" in found.reason


def test_an_audit_needs_a_promise(subject: Subject, private: Subject) -> None:
    assert "promises no" in DpAudit().unsuitable(subject)
    assert DpAudit().unsuitable(private) == ""
    example = fedq.build("privacy", "example_gaussian", noise_multiplier=1.0)
    experiment = private.experiment.replace(
        privacy=example, quantization=fedq.build("quantization", "none")
    )
    other = dataclasses.replace(private, experiment=experiment)
    assert "each example" in DpAudit().unsuitable(other)


def test_the_fitted_epsilon_is_the_gaussian_mechanism_s() -> None:
    """Scores N(1, z) against N(0, z), z = 1: epsilon 4.377 at 1e-5 (Balle and Wang)."""
    pytest.importorskip("dp_accounting")
    rng = np.random.default_rng(0)
    value, low, high = _fitted(rng.normal(1, 1, 20_000), rng.normal(0, 1, 20_000), 1e-5)
    assert low < 4.377 < high
    assert value == pytest.approx(4.377, abs=0.2)
    same = rng.normal(size=500)
    assert _fitted(same, same, 1e-5)[:2] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("property_inference", {"clients": 1}),
        ("property_inference", {"simulated": 3}),
        ("dp_audit", {"canaries": 10}),
        ("dp_audit", {"rounds": 0}),
    ],
)
def test_a_wrong_budget_is_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        fedq.build("evaluation", name, **options)


def test_outcomes_are_json(subject: Subject, tmp_path: Path) -> None:
    options = PropertyInference(clients=4, simulated=8)
    for outcome in options.run(subject, Work(0, tmp_path)):
        assert json.loads(json.dumps(outcome.to_json(), allow_nan=False))
