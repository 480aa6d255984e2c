"""Canaries against whole rounds: what they see must not refute the stated epsilon.

A mechanism that keeps its claim is refuted with a probability of 5 % at most (seeds are fixed); one
whose noise is ten times too small is caught.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fedq import Layout, build
from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.errors import ConfigError
from fedq.privacy.audit import one_run_epsilon
from fedq.privacy.base import Privacy
from fedq.strategy import FedQ
from tests.grids import InlineGrid

# isort: split
from flwr.app import Message

CANARIES, D, DELTA = 500, 20_000, 1e-5
LAYOUT = Layout.flat(D)
OPTIONS: dict[str, dict[str, Any]] = {"poisson_binomial": {"levels": 8}}


def canary(client: int) -> np.ndarray:
    x = np.random.default_rng(1000 + client).normal(size=D)
    return (x / np.linalg.norm(x)).astype(np.float32)


def audited(stated: Privacy, executed: Privacy) -> tuple[float, float]:
    """The lower bound that a round of canaries proves, and the epsilon that is stated of it."""
    included = np.random.default_rng(7).random(CANARIES) < 0.5

    def handle(message: Message, partition: int) -> Message:
        task = dataclasses.replace(Task.open(message, LAYOUT), privacy=executed)
        # Ten times the bound: clipping is a part of what is audited.
        delta = canary(partition) * np.float32(10.0 if included[partition] else 0.0)
        return task.reply(delta, examples=1, client=partition)

    fedq = FedQ(layout=LAYOUT, codec=Identity(), privacy=executed)
    after, report = fedq.run_round(
        InlineGrid(handle, CANARIES), fedq.initial(np.zeros(D, np.float32))
    )
    assert report.rejected == {}
    scores = np.array([canary(client) @ after.weights for client in range(CANARIES)])
    fedq.privacy = stated
    assert after.privacy is not None
    epsilon = stated.report(after.privacy)["epsilon"]  # type: ignore[index]
    return one_run_epsilon(included, scores, CANARIES // 5, DELTA), epsilon


@pytest.mark.parametrize(
    "name", ["gaussian", "adaptive_gaussian", "discrete_gaussian", "skellam", "poisson_binomial"]
)
def test_canaries_do_not_refute_the_stated_epsilon(name: str) -> None:
    privacy = build("privacy", name, noise_multiplier=1.0, seeded=True, **OPTIONS.get(name, {}))
    bound, stated = audited(privacy, privacy)
    assert 0.3 < bound <= stated, "or the audit sees nothing"


@pytest.mark.parametrize("name", ["gaussian", "skellam"])
def test_noise_ten_times_too_small_is_caught(name: str) -> None:
    claimed = build("privacy", name, noise_multiplier=4.0)
    broken = dataclasses.replace(claimed, noise_multiplier=0.4, seeded=True)
    bound, _ = audited(broken, broken)
    state = claimed.initial()
    about = FedQ(layout=LAYOUT, codec=Identity(), privacy=claimed)._about(1, CANARIES)
    stated = claimed.epsilon_of(claimed.rdp(CANARIES, about))
    assert state.noise_multiplier == 4.0
    assert bound > stated


def test_a_bound_that_is_not_enforced_is_caught() -> None:
    """Clipping at ten times the stated bound: the noise does not hide ten-fold canaries."""
    claimed = build("privacy", "gaussian", noise_multiplier=4.0)
    broken = dataclasses.replace(claimed, clip=10.0, noise_multiplier=0.4, seeded=True)
    bound, _ = audited(broken, broken)
    assert bound > claimed.epsilon_of(
        claimed.rdp(2, FedQ(layout=LAYOUT, codec=Identity())._about(1, 2))
    )


# --- the auditor itself --------------------------------------------------------------------------


def test_an_auditor_that_guesses_proves_nothing() -> None:
    refuted = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        refuted += one_run_epsilon(rng.random(400) < 0.5, rng.normal(size=400), 100, DELTA) > 0
    assert refuted <= 20  # expected 10 at most; above 20 with a probability below 0.002


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_audited_at_its_epsilon(epsilon: float) -> None:
    """Pure privacy that the auditor's guesses attain: rarely above, and not far below."""
    bounds = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        included = rng.random(2000) < 0.5
        truth = rng.random(2000) < 1 / (1 + np.exp(-epsilon))
        bounds.append(one_run_epsilon(included, np.where(truth, included, ~included), 1000, 0.0))
    assert np.mean(np.array(bounds) > epsilon) <= 0.12  # 0.05, and three standard deviations
    assert np.median(bounds) > 0.7 * epsilon


def test_a_wrong_use_of_the_auditor_is_an_error() -> None:
    for guesses in (0, 3, 12):
        with pytest.raises(ConfigError, match="even number of guesses"):
            one_run_epsilon(np.ones(10, bool), np.ones(10), guesses, DELTA)
