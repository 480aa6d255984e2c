"""Attacks stay in their ball and find what there is; gates catch masked models and weak attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedq import cli, registry
from fedq.errors import ConfigError
from fedq.evasion.apgd import Apgd, _checkpoints
from fedq.evasion.base import Access, Ball, Evasion, Target, cross_entropy, dlr, margin
from fedq.evasion.pgd import Pgd
from fedq.evasion.square import Square
from fedq.evasion.transfer import Transfer
from fedq.robustness.base import Work
from fedq.robustness.evasion import EvasionEvaluation
from fedq.robustness.outcome import Outcome
from fedq.robustness.subject import Subject

CASES = [
    pytest.param(cls(**options), norm, id=f"{name}-{norm}-{options}")
    for name, cls in registry.table("evasion").items()
    if name != "auto_attack"  # minutes
    for options in cls.examples  # type: ignore[attr-defined]
    for norm in cls.norms  # type: ignore[attr-defined]
]
#: Two losses: what one alone misses on an image or two, guesses may find.
ATTACKS = (
    Apgd(steps=15),
    Apgd(steps=15, loss="dlr"),
    Transfer(inner=Apgd(steps=15)),
    Square(queries=150),
)


def linear(shape: tuple[int, ...], classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    size = int(np.prod(shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- attacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attack", "norm"), CASES)
@pytest.mark.parametrize("shape", [(2, 6, 6), (3, 12), (10,)], ids=str)
def test_an_attack_stays_in_its_ball_and_box_and_is_a_function_of_its_seed(
    attack: Evasion, norm: Any, shape: tuple[int, ...]
) -> None:
    network = linear(shape)
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(1))
    y = network(x).argmax(1)
    for low, high in ((0.0, 1.0), (None, None)):
        ball = Ball(norm, 0.2, low, high)
        moved = attack(Target(network, network), x, y, ball, seed=3)
        assert moved.shape == x.shape
        assert (ball.project(moved, x) - moved).abs().max() < 1e-5
        assert torch.equal(moved, attack(Target(network, network), x, y, ball, seed=3))


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_an_attack_breaks_a_linear_network_where_a_closed_form_says_it_can(
    attack: Evasion, norm: Any
) -> None:
    """The least change that reaches class k is (z_y - z_k) / |w_y - w_k|, in the dual norm."""
    network = linear((20,), classes=3)
    (weight,) = [p for p in network.parameters() if p.dim() == 2]
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(2))
    logits = network(x)
    y = logits.argmax(1)
    apart = (weight[y][:, None] - weight[None]).norm(1 if norm == "linf" else 2, dim=2)
    reach = (logits.gather(1, y[:, None]) - logits) / apart.clamp_min(1e-12)
    reach[torch.arange(40), y] = torch.inf
    eps = float(reach.amin(1).median())
    moved = attack(Target(network, network), x, y, Ball(norm, eps), seed=0)
    broken = network(moved).argmax(1) != y
    assert not broken[reach.amin(1) > eps * 1.001].any()
    possible = reach.amin(1) < eps * (0.6 if attack.access == "black" else 0.9)
    thorough = attack.name == "apgd_targeted" or getattr(attack, "loss", "") == "dlr"
    assert broken[possible].float().mean() > (0.99 if thorough else 0.7)


def test_saturated_logits_have_a_gradient() -> None:
    logits = torch.tensor([[1000.0, 0.0, -500.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])).sum(), logits)
    assert (gradient != 0).any()
    small = torch.tensor([[3.0, 1.0, -2.0]])
    plain = nn.functional.cross_entropy(small, torch.tensor([0]))
    assert torch.equal(cross_entropy(small, torch.tensor([0]))[0], plain)


def test_the_margin_is_positive_where_the_answer_is_wrong() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    y = torch.tensor([0, 0])
    assert margin(logits, y).tolist() == [-2.0, 2.0]
    assert dlr(logits, y) == pytest.approx([-2 / 3, 1.0])
    assert torch.allclose(dlr(7 * logits, y), dlr(logits, y))
    assert dlr(logits[:, :2], y).tolist() == [-2.0, 2.0]


def test_bpda_climbs_where_the_straight_through_gradient_is_gone() -> None:
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.detach() * 4).round() + 0.0 * x

    x, y = torch.tensor([[0.3, 0.9]]), torch.tensor([1])
    target = Target(Dead(), nn.Identity())
    assert not target.climb(x, y, margin)[2].any()
    assert target.climb(x, y, margin, "bpda")[2].tolist() == [[1.0, -1.0]]


def test_step_sizes_are_reviewed_where_the_paper_says() -> None:
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd", {"steps": 0}),
        ("apgd", {"restarts": 0}),
        ("apgd_targeted", {"classes": 0}),
        ("square", {"queries": 0}),
        ("pgd", {"loss": "dlrr"}),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        registry.build("evasion", name, **options)


# --- the evaluation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = tmp_path_factory.mktemp("evasion") / "run"
    options = ["data=digits", "clients=5", "rounds=6", "model=mlp", "baseline=false"]
    assert cli.main(["simulate", *options, "engine.workers=1", f"run_dir={path}"]) == 0
    return Subject.load(path)


def evaluated(subject: Subject, **options: Any) -> Outcome:
    chosen = {"test_examples": 100, "eps": 0.15, "curve": (0.5, 2.0), "attacks": ATTACKS} | options
    (outcome,) = EvasionEvaluation(**chosen).run(subject, Work(0, Path("unused")))
    return outcome


def failed(outcome: Outcome) -> set[str]:
    return {gate.name for gate in outcome.gates if not gate.passed}


def test_an_honest_model_passes_the_gates_and_is_a_function_of_the_seed(subject: Subject) -> None:
    outcome = evaluated(subject)
    assert not failed(outcome), outcome.gates
    assert outcome.status == "measured"
    assert outcome.value is not None
    assert outcome.twin is not None
    assert outcome.interval is not None
    low, high = outcome.interval
    assert low <= outcome.value <= high
    assert outcome.value < subject.accuracy(*subject.sample(100, 0)) - 0.1
    assert evaluated(subject) == outcome
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_the_naive_attack_is_an_exhibit_and_finds_little(subject: Subject) -> None:
    plot = evaluated(subject).plot
    assert plot is not None
    last = {curve.label: curve.y[-1] for curve in plot.curves}
    assert last["naive attack (masked)"] > last["deployed"] + 10


class Masked(nn.Module):
    """What rounds without a straight-through estimator does to the gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x.detach()) + 0.0 * x.flatten(1).sum(1, keepdim=True)
        return out


def test_a_masked_model_is_invalid_however_robust_it_looks(subject: Subject) -> None:
    masked = dataclasses.replace(subject, network=Masked(subject.network))
    object.__setattr__(masked, "deployed", subject.deployed)
    object.__setattr__(masked, "twin_network", subject.twin_network)
    outcome = evaluated(masked)
    assert outcome.status == "invalid"
    assert {"gradients not masked", "gradients are no weaker than guesses"} <= failed(outcome)
    alone = evaluated(masked, attacks=ATTACKS[:1])
    assert alone.value is not None
    assert alone.value > 0.8  # what it would have claimed
    assert "accuracy falls to 0 with the budget" in failed(alone)


@registry.register("evasion", "broken")
class Broken(Evasion):
    """Goes down where it should go up, and forgets to project."""

    access: ClassVar[Access] = "white"

    def __call__(self, target: Target, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Tensor:
        _, _, gradient = target.climb(x, y, cross_entropy)
        return x - 100 * ball.direction(gradient)


del registry._TABLES["evasion"]["broken"]


def test_a_broken_attack_is_invalid(subject: Subject) -> None:
    outcome = evaluated(subject, attacks=(Broken(), *ATTACKS[1:]))
    assert outcome.status == "invalid"
    assert {
        "accuracy falls to 0 with the budget",
        "gradients are no weaker than guesses",
    } <= failed(outcome)


def test_an_attack_that_has_not_converged_is_invalid(subject: Subject) -> None:
    outcome = evaluated(subject, attacks=(Pgd(steps=1), Square(queries=2)))
    assert "attacks have converged" in failed(outcome)


def test_what_is_found_lies_on_the_grid_of_the_sensor() -> None:
    pixels = np.arange(4 * 36, dtype=np.uint8).reshape(4, 6, 6)

    class Eight:
        class dataset:
            kind, x_train = "image", pixels

        pixels = True
        on_grid = Subject.on_grid

    from fedq.robustness.evasion import _Trial

    trial = _Trial(Eight(), pixels / 255, np.zeros(4, int), 0, lambda done, of: None)  # type: ignore[arg-type]
    x = torch.from_numpy((pixels / 255).astype(np.float32))
    for norm, eps in (("linf", 0.03), ("l2", 0.4)):
        ball = Ball(norm, eps, 0.0, 1.0)  # type: ignore[arg-type]
        moved = ball.start(x, torch.Generator().manual_seed(0))
        found = trial._valid(moved, x, ball)
        codes = found.astype(np.float64) * 255
        assert np.abs(codes - np.rint(codes)).max() < 1e-4
        assert np.abs(ball.project(torch.from_numpy(found), x).numpy() - found).max() < 1e-6
        assert (found != x.numpy()).any()


@pytest.mark.parametrize(
    "options",
    [
        {"test_examples": 5},
        {"eps": 0.0},
        {"curve": (0.0,)},
        {"attacks": ()},
        {"attacks": (Square(),)},
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EvasionEvaluation(**options)


def test_options_go_to_json_and_back() -> None:
    evaluation = EvasionEvaluation(attacks=ATTACKS)
    plain = registry.to_config(evaluation)
    assert plain["attacks"][2]["inner"]["steps"] == 15
    assert registry.from_config("evaluation", plain) == evaluation
    assert "apgd(steps=15)" in registry.describe(evaluation)
