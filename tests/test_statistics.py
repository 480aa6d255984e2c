"""Laws of intervals and receiver operating characteristics."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from fedq.errors import ConfigError
from fedq.robustness._statistics import auc, clopper_pearson, mean, roc, tpr_at


@pytest.mark.parametrize("p", [0.001, 0.03, 0.5, 0.9])
@pytest.mark.parametrize("n", [10, 200])
def test_clopper_pearson_covers_every_share_at_least_as_often_as_it_says(p: float, n: int) -> None:
    """Exactly, over all outcomes of the binomial."""
    from scipy.stats import binom

    covered = sum(binom.pmf(k, n, p) for k in range(n + 1) if clopper_pearson(k, n, 0.95).holds(p))
    assert covered >= 0.95


def test_clopper_pearson_has_the_closed_ends() -> None:
    """None of n: 1 - (a/2)**(1/n); all of n: its mirror image."""
    assert clopper_pearson(0, 50).high == pytest.approx(1 - 0.025 ** (1 / 50))
    assert clopper_pearson(50, 50).low == pytest.approx(0.025 ** (1 / 50))
    with pytest.raises(ConfigError, match="0 of 0"):
        clopper_pearson(0, 0)


def test_auc_is_the_chance_that_a_member_is_above() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40).astype(float), rng.integers(0, 9, 30).astype(float)
    above = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
    assert auc(a, b).value == pytest.approx(above)
    assert auc(b, a).value == pytest.approx(1 - above)


def test_auc_intervals_cover_the_truth() -> None:
    """Two normals one deviation apart: AUC is Phi(1 / sqrt 2); 95 % of 400 within 4 deviations."""
    truth, rng = norm.cdf(2**-0.5), np.random.default_rng(1)
    covered = sum(auc(rng.normal(1, 1, 80), rng.normal(0, 1, 60)).holds(truth) for _ in range(400))
    assert covered / 400 > 0.95 - 4 * (0.95 * 0.05 / 400) ** 0.5


def test_perfect_separation_is_not_certain() -> None:
    area = auc(np.arange(20.0) + 100, np.arange(20.0))
    assert area.value == area.high == 1
    assert 0.8 < area.low < 1


def test_the_tpr_of_a_known_shift_is_found() -> None:
    """N(2, 1) against N(0, 1): power 1 - Phi(z - 2) at each rate."""
    rng = np.random.default_rng(2)
    members, others = rng.normal(2, 1, 20_000), rng.normal(0, 1, 20_000)
    for rate in (0.1, 0.01):
        found = tpr_at(rate, members, others)
        assert found.enough
        assert found.tpr.value == pytest.approx(norm.sf(norm.isf(rate) - 2), abs=0.03)
        assert found.fpr.value <= rate


def test_ties_never_exceed_the_rate_and_few_others_are_too_few() -> None:
    found = tpr_at(0.1, np.ones(10), np.ones(50))
    assert found.tpr.value == found.fpr.value == 0
    assert not found.enough
    assert tpr_at(0.1, np.ones(10), np.zeros(100)).enough
    assert not tpr_at(0.001, np.ones(10), np.zeros(9999)).enough


def test_a_roc_for_logarithmic_axes_is_positive_and_increasing() -> None:
    rng = np.random.default_rng(3)
    x, y = roc(rng.normal(1, 1, 500), rng.normal(0, 1, 500))
    assert min(x) > 0
    assert min(y) > 0
    assert x[-1] == y[-1] == 1
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) >= 0).all()


def test_the_mean_of_one_has_no_interval() -> None:
    assert mean(np.array([3.0])).interval == (-np.inf, np.inf)
    assert mean(np.full(5, 2.0)).interval == (2.0, 2.0)
