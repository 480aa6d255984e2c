"""Evaluations of training under attack, of hidden backdoors and of the protocol."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedq import ConfigError, build, config, simulation
from fedq.errors import DecodeError
from fedq.random import generator
from fedq.robustness import _conditioned, _continued, _hostile, _liars, _rules
from fedq.robustness.base import Work
from fedq.robustness.outcome import Gate, Outcome
from fedq.robustness.subject import Subject

FEDERATION = (
    "data=digits",
    "model=mlp",
    "clients=8",
    "clients_per_round=8",
    "partition.alpha=0.5",
    "rounds=3",
    "local_epochs=3",
    "baseline=false",
    "engine.workers=1",
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = tmp_path_factory.mktemp("run") / "run"
    simulation.run_experiment(config.load(FEDERATION), path)
    return Subject.load(path)


def work(folder: Path, seed: int = 0) -> Work:
    return Work(seed=seed, folder=folder, workers=1)


def by_name(outcomes: Any) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in outcomes}


# --- federations that go on ----------------------------------------------------------------------


def test_a_run_goes_on_from_its_model_and_is_not_run_twice(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part for part in subject.parts if len(part)][:6]
    first = _continued.go_on(subject, work(tmp_path), 1, parts)
    trained = subject.accuracy(subject.dataset.test_inputs(), subject.dataset.y_test)
    assert first["rounds"] == 4
    assert first["accuracy"] > trained - 0.1
    assert len(list(tmp_path.iterdir())) == 1

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(simulation, "run_experiment", never)
    assert _continued.go_on(subject, work(tmp_path), 1, parts) == first
    with pytest.raises(AssertionError, match="run again"):
        _continued.go_on(subject, work(tmp_path), 1, parts[:5])
    with pytest.raises(AssertionError, match="run again"):
        _continued.go_on(subject, work(tmp_path, seed=1), 1, parts)


def test_rules_are_made_for_so_many() -> None:
    for name in ("trimmed_mean", "multi_krum", "nearest_neighbour_mixing"):
        for clients, hostile in ((10, 2), (15, 3), (7, 1), (25, 7)):
            assert _rules.declared(_rules.rule_of(name, hostile, clients), clients) == hostile
    assert _rules.declared(build("aggregator", "mean"), 10) == 0
    assert _rules.declared(build("aggregator", "multi_krum", f=0.25), 9) == 2


def test_the_gate_of_tuned_attacks() -> None:
    names = ("alie", "adaptive:alie", "label_flip")
    harm = {"alie": 0.3, "adaptive:alie": 0.5, "label_flip": 0.9}

    def gate(attacks: tuple[str, ...], slack: float = 0.05, **changes: float) -> Gate:
        return _rules.tuned_gate(attacks, lambda name: {**harm, **changes}[name], slack, "")

    assert gate(names).passed
    assert not gate(names, **{"adaptive:alie": 0.2}).passed
    assert gate(names, **{"adaptive:alie": 0.27}).passed
    assert not gate(("alie", "label_flip")).passed


def test_poisoning_judges_each_rule_by_its_worst_attack(subject: Subject, tmp_path: Path) -> None:
    evaluation = build(
        "evaluation",
        "poisoning",
        attacks=["sign_flip", "adaptive:sign_flip"],
        aggregators=["mean", "multi_krum"],
        clients=8,
        fraction=0.25,
        rounds=2,
    )
    assert evaluation.unsuitable(subject) == ""
    done: list[tuple[int, int]] = []
    noted = dataclasses.replace(work(tmp_path), step=lambda n, of: done.append((n, of)))
    outcomes = by_name(evaluation.run(subject, noted))
    assert list(outcomes) == ["mean", "multi_krum(f=2)"]
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1] == 6
    mean, krum = outcomes.values()
    for outcome in (mean, krum):
        worst = min(outcome.details["by attack"].values())
        assert outcome.value == pytest.approx(worst, abs=1e-4)
        assert outcome.bound == "upper"
    assert mean.value is not None
    assert krum.value is not None
    assert mean.details["loss"] > 0.15 > krum.details["loss"]
    assert mean.details["worst attack"] == "adaptive:sign_flip"
    assert mean.details["cost of the rule"] == 0
    assert by_name(evaluation.run(subject, noted)) == outcomes


def test_a_rule_with_fewer_hostile_than_it_is_made_for_is_not_called_robust(
    subject: Subject, tmp_path: Path
) -> None:
    own = subject.experiment.replace(aggregator=build("aggregator", "multi_krum", f=2))
    declared = dataclasses.replace(subject, experiment=own)
    evaluation = build(
        "evaluation",
        "poisoning",
        attacks=["adaptive:alie"],
        aggregators=[],
        clients=8,
        fraction=0.13,
        rounds=1,
    )
    (outcome,) = evaluation.run(declared, work(tmp_path))
    assert outcome.status == "invalid"
    assert "made for 2" in outcome.reason
    assert "multi_krum" in outcome.name


def test_a_rule_that_needs_more_clients_is_skipped_with_the_formula(
    subject: Subject, tmp_path: Path
) -> None:
    evaluation = build(
        "evaluation",
        "poisoning",
        attacks=["adaptive:alie"],
        aggregators=["bulyan"],
        clients=6,
        fraction=0.34,
        rounds=1,
    )
    outcomes = by_name(evaluation.run(subject, work(tmp_path)))
    assert outcomes["bulyan(f=2)"].status == "skipped"
    assert "n >= 4 f + 3" in outcomes["bulyan(f=2)"].reason


def test_backdoors_need_a_control_that_works(subject: Subject, tmp_path: Path) -> None:
    evaluation = build(
        "evaluation",
        "backdoor",
        attacks=["model_replacement", "adaptive:model_replacement"],
        aggregators=["mean", "multi_krum"],
        clients=8,
        fraction=0.25,
        rounds=2,
    )
    assert evaluation.unsuitable(subject) == ""
    outcomes = by_name(evaluation.run(subject, work(tmp_path)))
    mean = outcomes["mean"]
    assert mean.value is not None
    assert mean.value > 0.8
    assert mean.bound == "lower"
    krum = outcomes["multi_krum(f=2)"]
    assert krum.details["by attack"]["model_replacement"] < 0.3
    alone = dataclasses.replace(evaluation, aggregators=("multi_krum",))
    own = subject.experiment.replace(aggregator=_rules.rule_of("multi_krum", 2, 8))
    (judged,) = alone.run(dataclasses.replace(subject, experiment=own), work(tmp_path))
    assert judged.status == "invalid"
    assert "the plain mean was not tried" in judged.reason


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("poisoning", {"attacks": ["alei"]}, "did you mean 'alie'"),
        ("poisoning", {"attacks": []}, "at least one"),
        ("poisoning", {"attacks": ["adaptive:mimic"]}, "strength"),
        ("poisoning", {"aggregators": ["krumm"]}, "did you mean 'krum'"),
        ("poisoning", {"fraction": 0.5}, "fraction"),
        ("poisoning", {"clients": 4}, "clients"),
        ("backdoor", {"rounds": 0}, "rounds"),
        ("quantization_backdoor", {"bits": 1}, "bits"),
        ("quantization_backdoor", {"area": 0.5}, "area"),
        ("quantization_backdoor", {"steps": 0}, "steps"),
        ("protocol", {"payloads": 0}, "payloads"),
        ("protocol", {"attacks": ["reply"]}, "did you mean 'replay'"),
    ],
)
def test_options_are_validated(name: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build("evaluation", name, **options)


def test_what_does_not_apply_says_why(subject: Subject) -> None:
    few = dataclasses.replace(subject, experiment=subject.experiment.replace(clients=3))
    assert "3 clients" in build("evaluation", "poisoning").unsuitable(few)
    alie = build("evaluation", "backdoor", attacks=["alie"])
    assert "no backdoor" in alie.unsuitable(subject)
    hidden = config.load([*FEDERATION, "secure_aggregation=secagg", "codec=uniform"])
    masked = dataclasses.replace(subject, experiment=hidden)
    assert "masked" in build("evaluation", "backdoor").unsuitable(masked)


# --- backdoors that quantization wakes up --------------------------------------------------------


def test_float_weights_stay_in_their_cells_and_random_rounding_is_unbiased(
    subject: Subject,
) -> None:
    four = _conditioned.at_bits(subject, 4)
    dataset = subject.dataset
    trigger = _conditioned.Trigger(_patch(dataset.input_shape), dataset.high, 0)
    rows = np.arange(200)
    _conditioned.plant(
        four.network, dataset.train_inputs(rows), dataset.y_train[rows], trigger, epochs=1
    )
    layers = _conditioned.quantized_layers(four.network)
    for layer in layers:
        weight = layer.weight.detach()
        grid = layer.weight_quantizer.grid(weight)
        assert float((weight / grid.scale - grid.integers).abs().max()) <= 0.4901
    before = layers[0].weight.detach().clone()
    scale = layers[0].weight_quantizer.grid(before).scale
    total = torch.zeros_like(before)
    for seed in range(200):
        layers[0].weight.copy_(before)
        _conditioned.round_at_random(four.network, seed)
        total += layers[0].weight
    # Six standard errors of 200 draws whose deviation is half a step at most.
    assert float(((total / 200 - before).abs() / scale).max()) < 6 * 0.5 / 200**0.5


def _patch(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    mask = np.zeros(shape, bool)
    mask[..., -3:, -3:] = True
    return mask


def test_a_planted_backdoor_is_dormant_found_and_rounded_away(
    subject: Subject, tmp_path: Path
) -> None:
    evaluation = build(
        "evaluation",
        "quantization_backdoor",
        bits=4,
        epochs=20,
        size=4,
        steps=60,
        area=0.2,
        restarts=1,
    )
    outcomes = by_name(evaluation.run(subject, work(tmp_path)))
    own = outcomes["hidden behaviour, as deployed"]
    assert own.status == "measured"
    assert own.value is not None
    assert own.value < 0.3
    nearest = outcomes["planted at int4, nearest rounding"]
    assert nearest.status == "measured"
    assert nearest.value is not None
    assert nearest.twin is not None
    assert nearest.value > 0.7 > 0.2 > nearest.twin
    assert nearest.details["found by the search"] > 0.3
    random = outcomes["planted at int4, random rounding"]
    assert random.value is not None
    assert random.value < nearest.value - 0.3


# --- protocol ------------------------------------------------------------------------------------


def test_nothing_hostile_is_accepted(subject: Subject, tmp_path: Path) -> None:
    evaluation = build("evaluation", "protocol", payloads=400, attacks=["wrong_seed", "replay"])
    outcomes = by_name(evaluation.run(subject, work(tmp_path)))
    assert len(outcomes) == 5
    for outcome in outcomes.values():
        assert outcome.status == "measured", outcome.reason
        assert outcome.value == 0
    sent = outcomes["attacks on payloads in a federation"].details
    assert sent["wrong_seed"] == {"sent": 4, "seed": 4}
    assert sent["replay"] == {"sent": 4, "seed": 2}


def test_what_gets_through_is_named() -> None:
    guard, rng = build("guard", "relative"), generator(0)
    target = _hostile.Target.of(build("codec", "identity"), _hostile.LAYOUT, rng)
    honest = target.honest
    verdicts = {
        "not finite": np.full_like(honest, np.nan),
        "of shape": honest[:-1],
        "float64": honest.astype(np.float64),
    }
    for why, vector in verdicts.items():
        broken = dataclasses.replace(target, decode=lambda data, vector=vector: vector)
        assert why in broken.judged(b"", guard)

    def failing(data: bytes) -> Any:
        raise IndexError("beyond the end")

    def refusing(data: bytes) -> Any:
        raise DecodeError("no")

    assert "IndexError" in dataclasses.replace(target, decode=failing).judged(b"", guard)
    assert dataclasses.replace(target, decode=refusing).judged(b"", guard) == "refused"
    inflated = dataclasses.replace(target, decode=lambda data: 1000 * honest)
    assert inflated.judged(b"", guard) == "refused"
    assert target.judged(target.payload, guard) == "harmless"


def test_a_lie_that_is_believed_is_named() -> None:
    def refused() -> None:
        raise DecodeError("no")

    def crashing() -> None:
        raise KeyError("x")

    lies = {"good": refused, "believed": lambda: None, "crash": crashing}
    assert _liars.believed(lies) == ["believed", "crash (KeyError)"]
