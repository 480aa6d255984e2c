"""The accountant against closed forms, published values and dp-accounting's own composition."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from scipy.stats import norm as normal

from fedq import build
from fedq.errors import ConfigError
from fedq.privacy._ledger import (
    ORDERS,
    Ledger,
    gaussian_epsilon,
    gaussian_rdp,
    rdp_epsilon,
    sampled_gaussian_epsilon,
)
from fedq.privacy.base import Contribution, PrivacyState, Round
from fedq.privacy.example_gaussian import sampled_gaussian_rdp
from fedq.privacy.poisson_binomial import _binomial, _moments, coordinate_rdp

DELTA = 1e-5


def pld_epsilon(event: dp_accounting.DpEvent, delta: float = DELTA) -> float:
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(event)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("z", [0.3, 1.0, 4.0, 50.0])
def test_one_gaussian_release_is_the_closed_form(z: float) -> None:
    """Balle and Wang 2018, theorem 8: delta as a function of epsilon."""
    epsilon = gaussian_epsilon(gaussian_rdp(z), DELTA)
    delta = normal.cdf(1 / (2 * z) - epsilon * z)
    delta -= math.exp(epsilon) * normal.cdf(-1 / (2 * z) - epsilon * z)
    assert delta == pytest.approx(DELTA, rel=1e-4)


@pytest.mark.parametrize(("z", "times"), [(1.0, 1), (2.0, 10), (8.0, 100)])
def test_composed_gaussians_agree_with_pld_and_lie_below_rdp(z: float, times: int) -> None:
    rdp = times * gaussian_rdp(z)
    exact = gaussian_epsilon(rdp, DELTA)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), times)
    assert exact == pytest.approx(pld_epsilon(event), abs=2e-3)
    assert exact < rdp_epsilon(rdp, DELTA) < 1.15 * exact


def test_releases_of_different_noise_compose() -> None:
    total = gaussian_rdp(1.0) + gaussian_rdp(2.0) + gaussian_rdp(2.0)
    assert gaussian_epsilon(total, DELTA) == pytest.approx(
        gaussian_epsilon(gaussian_rdp((1 + 1 / 4 + 1 / 4) ** -0.5), DELTA)
    )


def test_rdp_agrees_with_dp_accounting() -> None:
    accountant = dp_accounting.rdp.RdpAccountant(ORDERS)
    accountant.compose(dp_accounting.GaussianDpEvent(0.7), 5)
    assert rdp_epsilon(5 * gaussian_rdp(0.7), DELTA) == pytest.approx(accountant.get_epsilon(DELTA))


def test_nothing_released_costs_nothing() -> None:
    assert gaussian_epsilon(0 * ORDERS, DELTA) == rdp_epsilon(0 * ORDERS, DELTA) == 0


def test_a_known_value_of_dp_sgd() -> None:
    """Abadi et al. 2016, section 5.1: q = 0.01, sigma = 4, 10000 steps, delta 1e-5: 1.26."""
    assert rdp_epsilon(sampled_gaussian_rdp(4.0, 0.01, 10_000), DELTA) < 1.26
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(4.0)), 10_000
    )
    assert pld_epsilon(event) < rdp_epsilon(sampled_gaussian_rdp(4.0, 0.01, 10_000), DELTA)


# --- distributed mechanisms ----------------------------------------------------------------------

ABOUT = Round(number=1, seed=0, cohort=100, size=1 << 17)


@pytest.mark.parametrize("name", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize("z", [1.0, 2.0, 5.0])
def test_sixteen_bits_cost_what_the_gaussian_costs(name: str, z: float) -> None:
    privacy = build("privacy", name, noise_multiplier=z)
    rdp = 10 * privacy.rdp(100, ABOUT)
    whole = 10 * gaussian_rdp(z)
    integer = np.array([order == int(order) for order in ORDERS])
    np.testing.assert_allclose(rdp[integer][:20], whole[integer][:20], rtol=2e-3)
    assert privacy.encoder(ABOUT).l2 < 1.02 * privacy.encoder(ABOUT).scale


def test_few_bits_are_not_free() -> None:
    fine, coarse = (
        build("privacy", "skellam", noise_multiplier=1.0, bits=bits) for bits in (16, 12)
    )
    inflation = [p.encoder(ABOUT).l2 / p.encoder(ABOUT).scale for p in (fine, coarse)]
    assert inflation[1] > 1.1 * inflation[0]


def test_the_theorem_of_skellam_holds_against_exact_divergences() -> None:
    """One coordinate, exact probabilities: the bound is above, and near."""
    from scipy.special import ive

    for variance, shift in ((50.0, 3), (400.0, 10)):
        width = int(11 * math.sqrt(variance))
        k = np.arange(-width, width + 1)
        log_p, log_q = np.log(ive(np.abs(k), variance)), np.log(ive(np.abs(k - shift), variance))
        for order in (2, 4, 8):
            divergence = np.log(np.exp(order * log_p + (1 - order) * log_q).sum()) / (order - 1)
            l1, l2 = shift, shift
            bound = order * l2**2 / (2 * variance) + min(
                ((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance)
            )
            assert divergence <= bound <= 1.1 * divergence


def test_discrete_gaussians_that_do_not_add_up_are_refused() -> None:
    about = Round(number=1, seed=0, cohort=5000, size=100_000)
    with pytest.raises(ConfigError, match="not add up to one"):
        build("privacy", "discrete_gaussian", noise_multiplier=0.05).encoder(about)
    build("privacy", "skellam", noise_multiplier=0.05).encoder(about)


@pytest.mark.parametrize("name", ["discrete_gaussian", "skellam", "poisson_binomial"])
def test_dropouts_are_paid_for(name: str) -> None:
    privacy = build("privacy", name, noise_multiplier=1.0)
    costs = [privacy.epsilon_of(privacy.rdp(replies, ABOUT)) for replies in (100, 80, 50)]
    assert costs[0] < costs[1] < costs[2]
    exact = [
        rdp_epsilon(gaussian_rdp(math.sqrt(replies / 100)), DELTA) for replies in (100, 80, 50)
    ]
    np.testing.assert_allclose(costs, exact, rtol=0.1)


def test_the_server_s_noise_does_not_drop_out() -> None:
    privacy = build("privacy", "gaussian", noise_multiplier=1.0)
    np.testing.assert_array_equal(privacy.rdp(100, ABOUT), privacy.rdp(3, ABOUT))


def test_poisson_binomial_divergences_are_bounded_by_their_coefficient() -> None:
    """Against brute force: every pattern of the others' biases that matters, both directions."""
    n, m, theta = 6, 3, 0.2
    cost = coordinate_rdp(n, m, theta)

    def pmf(biases: list[float]) -> np.ndarray:
        out = np.ones(1)
        for bias in biases:
            for _ in range(m):
                out = np.convolve(out, [0.5 - bias, 0.5 + bias])
        return out

    for high in range(n):
        for own in (0.05, 0.2, -0.2):
            others = [theta] * high + [-theta] * (n - 1 - high)
            p, q = pmf([own, *others]), pmf([0.0, *others])
            for a, b in ((p, q), (q, p)):
                for order in (1.5, 2.0, 8.0, 64.0):
                    at = int(np.flatnonzero(np.isclose(order, ORDERS))[0])
                    divergence = math.log((b * (a / b) ** order).sum()) / (order - 1)
                    assert divergence <= cost[at] * own**2 * (1 + 1e-9)


def test_poisson_binomial_coefficients_hold_between_the_biases_they_are_made_of() -> None:
    for n, m, theta in ((5, 1, 0.25), (40, 4, 0.1), (9, 16, 0.25), (2, 1, 0.02)):
        cost = coordinate_rdp(n, m, theta)
        for b in np.linspace(0.01, 1, 100) * theta:
            p = np.convolve(_binomial(m, 0.5 + b), _binomial((n - 1) * m, 0.5))
            moments = _moments(p, _binomial(n * m, 0.5))
            assert (np.log1p(moments) / ((ORDERS - 1) * b**2) <= cost).all()


# --- ledger and calibration ----------------------------------------------------------------------


def test_clients_pay_for_the_rounds_that_hold_their_update() -> None:
    privacy = build("privacy", "gaussian", noise_multiplier=2.0)
    state = privacy.initial()
    for clients in ([1, 2], [2, 3], [2**64 - 1, 2]):
        accepted = [Contribution(c, 1) for c in clients]
        state = privacy.after(state, accepted, ABOUT, privacy.entropy(ABOUT))
    assert state.ledger.clients.tolist() == [1, 2, 3, 2**64 - 1]
    assert state.ledger.releases.tolist() == [1, 3, 1, 1]
    assert privacy.report(state)["epsilon"] == pytest.approx(
        gaussian_epsilon(3 * gaussian_rdp(2.0), DELTA)
    )
    releases, rdp = state.ledger.of([3, None, 77])
    assert releases.tolist() == [1, 0, 0]
    assert rdp[0].any()
    assert not rdp[1:].any()


def test_a_ledger_survives_a_checkpoint() -> None:
    state = PrivacyState(0.3, 1.5, Ledger().charged([5, 2], gaussian_rdp(1.0)))
    again = PrivacyState.load(state.tensors(), state.meta())
    assert again is not None
    assert (again.clip, again.noise_multiplier) == (0.3, 1.5)
    for name, tensor in state.tensors().items():
        np.testing.assert_array_equal(again.tensors()[name], tensor)
    assert PrivacyState.load({}, None) is None


@pytest.mark.parametrize(
    "name", ["gaussian", "adaptive_gaussian", "discrete_gaussian", "skellam", "poisson_binomial"]
)
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_calibrated_noise_meets_the_budget_and_hardly_less(name: str, epsilon: float) -> None:
    options = {"levels": 64} if name == "poisson_binomial" else {}
    privacy = build("privacy", name, epsilon=epsilon, **options)
    about = Round(number=1, seed=0, cohort=10, size=5000)
    state = privacy.calibrated(privacy.initial(), 7, 6, about)
    settled = privacy.at(state)
    for _ in range(7):
        assert not settled.exhausted(state, [4, 5], 6, about)
        state = settled.after(
            state, [Contribution(c, 1) for c in range(10)], about, settled.entropy(about)
        )
    spent = settled.report(state)["epsilon"]
    assert 0.85 * epsilon < spent <= epsilon
    assert settled.exhausted(state, [4, 5], 6, about)
    assert not settled.exhausted(state, [77, None], 6, about)  # they have spent nothing


def test_noise_that_is_given_is_kept() -> None:
    privacy = build("privacy", "gaussian", epsilon=1.0, noise_multiplier=3.0)
    about = Round(number=1, seed=0, cohort=10, size=50)
    assert privacy.calibrated(privacy.initial(), 5, 5, about).noise_multiplier == 3.0


def test_a_budget_that_nothing_meets_says_what_is_in_the_way() -> None:
    about = Round(number=1, seed=0, cohort=10, size=5000)
    tiny = build("privacy", "gaussian", epsilon=1e-9, delta=1e-12)
    with pytest.raises(ConfigError, match="no noise reaches the budget"):
        tiny.calibrated(tiny.initial(), 5, 5, about)
    narrow = build("privacy", "skellam", epsilon=3.0, bits=4)
    with pytest.raises(ConfigError, match="bits=4 is too few"):
        narrow.calibrated(narrow.initial(), 5, 5, about)


# --- example level -------------------------------------------------------------------------------


def test_example_level_costs_agree_with_pld() -> None:
    privacy = build("privacy", "example_gaussian", noise_multiplier=1.1)
    about = Round(1, 0, 10, 100, batch_size=16, epochs=2)
    share, steps = privacy.sampling(256, about)
    assert (share, steps) == (1 / 16, 32)
    stated = privacy.epsilon_of(3 * privacy.round_rdp(256, about))
    step = dp_accounting.PoissonSampledDpEvent(share, dp_accounting.GaussianDpEvent(1.1))
    exact = pld_epsilon(dp_accounting.SelfComposedDpEvent(step, 3 * steps))
    assert exact < stated < 1.25 * exact


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 30), (0.7, 5)])
def test_the_loss_distribution_of_all_examples_is_the_gaussian_s(noise: float, steps: int) -> None:
    exact = gaussian_epsilon(steps * gaussian_rdp(noise), 1e-5)
    found = sampled_gaussian_epsilon(noise, 1.0, steps, 1e-5)
    assert exact <= found <= 1.002 * exact


def test_a_changed_number_of_examples_is_accounted_by_rdp() -> None:
    privacy = build("privacy", "example_gaussian", noise_multiplier=1.0)
    about = Round(1, 0, 2, 100, batch_size=10, epochs=1)
    state = privacy.initial()
    for examples in (20, 20, 40):
        ones = [Contribution(0, 20), Contribution(1, examples)]
        state = privacy.after(state, ones, about, privacy.entropy(about))
    kept = PrivacyState.load(state.tensors(), state.meta())
    assert kept is not None
    assert kept.ledger.steps.tolist() == [6, 8]
    assert kept.ledger.share[0] == 0.5
    assert np.isnan(kept.ledger.share[1])
    said = privacy.at(kept).statement(kept, 2)["epsilon_by_client"]
    assert said["0"] < privacy.epsilon_of(kept.ledger.rdp[0])
    assert said["1"] == privacy.epsilon_of(kept.ledger.rdp[1])


def test_a_client_of_few_examples_pays_more_and_is_what_is_stated() -> None:
    privacy = build("privacy", "example_gaussian", noise_multiplier=1.0)
    about = Round(1, 0, 2, 100, batch_size=10, epochs=1)
    both = [Contribution(0, 20), Contribution(1, 500)]
    state = privacy.after(privacy.initial(), both, about, privacy.entropy(about))
    _, (small, large) = state.ledger.of([0, 1])
    assert privacy.epsilon_of(small) > privacy.epsilon_of(large)
    said = privacy.statement(state, 2)
    assert 0.8 * privacy.epsilon_of(small) < said["epsilon"] < privacy.epsilon_of(small)
    assert said["epsilon"] == max(said["epsilon_by_client"].values())
    assert 0.5 * privacy.epsilon_of(large) < said["epsilon_by_client"]["1"]
    assert said["epsilon_by_client"]["1"] < privacy.epsilon_of(large)


def test_an_example_budget_is_foreseen() -> None:
    about = Round(1, 0, 2, 100, batch_size=10, epochs=1)
    one = build("privacy", "example_gaussian", noise_multiplier=1.0)
    cost = one.epsilon_of(one.round_rdp(50, about))
    privacy = build("privacy", "example_gaussian", noise_multiplier=1.0, epsilon=1.05 * cost)
    assert privacy.refusal(50, about) is None
    assert "examples cost" in str(privacy.refusal(20, about))
    state = privacy.initial()
    assert not privacy.exhausted(state, [0], 1, about)
    state = privacy.after(state, [Contribution(0, 50)], about, privacy.entropy(about))
    assert privacy.exhausted(state, [0], 1, about)
    assert not privacy.exhausted(state, [1], 1, about)
