"""Noise is what it claims to be, and no update moves a sum by more than the bound.

Statistical tests compare with exact probabilities; each fails by chance with a probability of one
in ten thousand, and seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ive

from fedq import build
from fedq.errors import ConfigError
from fedq.privacy._clip import clipped, norm
from fedq.privacy._distributed import NoisyCodes, rounded_norm
from fedq.privacy._entropy import Entropy
from fedq.privacy._samplers import discrete_gaussian, gaussian_table, skellam_table
from fedq.privacy.base import Round
from fedq.privacy.gaussian import GRID, noisy_sum

CHANCE = 1e-4
SAMPLES = 200_000
DISTRIBUTED = ("discrete_gaussian", "skellam", "poisson_binomial")


def chi_square(samples: np.ndarray, pmf: np.ndarray, first: int) -> float:
    """The p-value of integers against their exact probabilities; rare ones are pooled."""
    expected = pmf / pmf.sum() * samples.size
    common = expected >= 10
    counts = np.bincount(np.clip(samples - first, -1, pmf.size) + 1, minlength=pmf.size + 2)
    observed = counts[1:-1].astype(float)
    seen = np.append(observed[common], samples.size - observed[common].sum())
    wanted = np.append(expected[common], samples.size - expected[common].sum())
    if wanted[-1] < 10:  # too few for a cell of their own
        seen, wanted = seen[:-1], wanted[:-1] * seen[:-1].sum() / wanted[:-1].sum()
    return float(stats.chisquare(seen, wanted).pvalue)


def gaussian_pmf(sigma: float, k: np.ndarray) -> np.ndarray:
    return np.exp(-(k.astype(float) ** 2) / (2 * sigma**2))


def skellam_pmf(variance: float, k: np.ndarray) -> np.ndarray:
    return ive(np.abs(k), variance)  # the exponential scaling is the factor exp(-variance)


# --- samplers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1, 2, 7, 60])
def test_the_discrete_gaussian_has_its_exact_distribution(sigma: int) -> None:
    k = np.arange(-12 * sigma, 12 * sigma + 1)
    samples = discrete_gaussian(sigma, SAMPLES, Entropy(sigma))
    assert chi_square(samples, gaussian_pmf(sigma, k), int(k[0])) > CHANCE


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5, 60.0])
def test_the_table_of_the_discrete_gaussian(sigma: float) -> None:
    k = np.arange(-math.ceil(12 * sigma), math.ceil(12 * sigma) + 1)
    samples = gaussian_table(sigma).sample(SAMPLES, Entropy(5))
    assert chi_square(samples, gaussian_pmf(sigma, k), int(k[0])) > CHANCE


@pytest.mark.parametrize("variance", [0.3, 1.0, 9.0, 2500.0])
def test_the_table_of_the_skellam_distribution(variance: float) -> None:
    last = math.ceil(12 * math.sqrt(variance)) + 8
    samples = skellam_table(variance).sample(SAMPLES, Entropy(6))
    assert chi_square(samples, skellam_pmf(variance, np.arange(-last, last + 1)), -last) > CHANCE


def test_a_wrong_distribution_is_noticed() -> None:
    k = np.arange(-80, 81)
    samples = gaussian_table(7.0).sample(SAMPLES, Entropy(1))
    assert chi_square(samples, gaussian_pmf(7.2, k), -80) < 1e-9
    assert chi_square(samples, skellam_pmf(49.0, k), -80) < 1e-2


@pytest.mark.parametrize("sigma", [0.6, 20.0])
def test_tables_hold_exact_probabilities(sigma: float) -> None:
    table = gaussian_table(sigma)
    k = table.first + np.arange(table.high.size)
    cumulative = table.high * 2.0**-64
    expected = np.cumsum(gaussian_pmf(sigma, k) / gaussian_pmf(sigma, k).sum())
    np.testing.assert_allclose(cumulative, expected, atol=1e-14)
    assert expected[0] < 2.0**-100 or sigma < 1


def test_large_discrete_gaussians_look_gaussian() -> None:
    samples = discrete_gaussian(GRID, 50_000, Entropy(9)) / GRID
    assert stats.kstest(samples, "norm").pvalue > CHANCE


def test_words_are_uniform_and_secret() -> None:
    bits = np.unpackbits(Entropy(3).words(20_000).view(np.uint8))
    assert stats.binomtest(int(bits.sum()), bits.size).pvalue > CHANCE
    assert not (Entropy().words(4) == Entropy().words(4)).any()
    one, other = Entropy(4), Entropy(4)
    split = np.concatenate([one.words(3), one.words(5)])
    np.testing.assert_array_equal(split, other.words(8))


@pytest.mark.parametrize("bad", [0, -1, 1 << 25])
def test_samplers_refuse_what_they_cannot_do(bad: int) -> None:
    with pytest.raises(ConfigError, match="sigma from 1"):
        discrete_gaussian(bad, 1, Entropy(0))
    with pytest.raises(ConfigError, match="standard deviation"):
        gaussian_table(float(bad))
    with pytest.raises(ConfigError, match="variance"):
        skellam_table(float(bad) * abs(bad))


# --- bounds --------------------------------------------------------------------------------------

vectors = st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=80).map(
    lambda values: np.array(values, np.float32)
)


@given(vectors, st.floats(1e-6, 1e6))
def test_a_clipped_vector_is_never_longer(x: np.ndarray, bound: float) -> None:
    y = clipped(x, bound)
    assert y.dtype == np.float32
    assert math.sqrt(math.fsum(float(v) ** 2 for v in y)) <= bound * (1 + 1e-15)
    if norm(x) <= bound:
        assert y is x


@given(
    vectors,
    st.integers(0, 2**32),
    st.sampled_from([2, 9, 14, 16]),
    st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_a_rounded_vector_is_never_longer(x: np.ndarray, seed: int, bits: int, clip: float) -> None:
    sigma = 0.01 if bits == 2 else 0.5
    about = Round(number=seed % 7, seed=seed, cohort=2, size=x.size)
    privacy = build("privacy", "skellam", noise_multiplier=sigma, bits=bits, clip=clip)
    try:
        encoder = privacy.encoder(about)
    except ConfigError:
        assert bits < 9
        return
    integers = encoder.rounded(x, Entropy(seed))
    assert int(np.dot(integers, integers)) <= encoder.l2**2
    assert encoder.l2 == rounded_norm(encoder.scale * clip, encoder.count)


def test_the_bound_on_rounding_is_needed_and_reached_at_times() -> None:
    """Rounding lengthens vectors: without the second draw some exceed a bound that is tight."""
    encoder = NoisyCodes(4096, 1.0, 2, 16, 0, 64.0, 1.0, gaussian_table)
    x = np.full(4096, 1 / 64, np.float32)
    lengths = [math.sqrt(float(np.square(encoder.rounded(x, Entropy(s))).sum())) for s in range(50)]
    assert 64 < np.mean(lengths) < encoder.l2 < 1.05 * max(lengths)


@pytest.mark.parametrize("name", ["gaussian", "adaptive_gaussian"])
@given(data=st.data())
def test_one_client_moves_the_sum_by_the_bound_at_most(name: str, data: st.DataObject) -> None:
    """The sensitivity law: neighbouring cohorts, exact arithmetic, hostile values."""
    privacy = build("privacy", name, noise_multiplier=1.0, clip=0.7)
    updates = data.draw(
        st.lists(
            st.lists(st.floats(-10000, 10000, width=32), min_size=5, max_size=5),
            min_size=2,
            max_size=6,
        )
    )
    about = Round(number=1, seed=0, cohort=len(updates), size=5)
    streams = [privacy.stream(build("aggregator", "mean"), about, len(updates)) for _ in range(2)]
    for slot, update in enumerate(updates):
        received = privacy.received(np.array(update, np.float32))
        for which, stream in enumerate(streams):
            zero = which == 1 and slot == 0
            stream.add(np.zeros(5, np.float32) if zero else received, 1.0, slot)
    sums = [stream.result().astype(np.float64) * len(updates) for stream in streams]
    allowed = 0.7 * (1 + len(updates) * 2.0**-23)
    assert np.linalg.norm(sums[0] - sums[1]) <= allowed


@pytest.mark.parametrize("name", ["discrete_gaussian", "skellam"])
def test_one_client_moves_the_sum_of_codes_by_the_bound_at_most(name: str) -> None:
    about = Round(number=2, seed=1, cohort=5, size=300)
    privacy = build("privacy", name, noise_multiplier=1.0, clip=0.1)
    encoder = privacy.encoder(about)
    rng = np.random.default_rng(0)
    for trial in range(20):
        x = (rng.normal(size=300) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
        moved = encoder.rounded(x, Entropy(trial)) - encoder.rounded(0 * x, Entropy(trial))
        assert np.linalg.norm(moved) <= encoder.l2


# --- mechanisms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "sigma"), [(GRID, 1.0), (1 << 14, 2.0)])
def test_central_noise_has_the_stated_size(grid: int, sigma: float) -> None:
    d = 40_000
    out = noisy_sum(np.full(d, 0.25), 0.5, sigma, 10, Entropy(2), grid)
    noise = out - 0.25
    claimed = 0.5 * sigma / (1 - sigma * math.sqrt(d) / grid)
    assert stats.kstest(noise / claimed, "norm").pvalue > CHANCE


def test_noise_that_would_drown_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="drowns"):
        noisy_sum(np.zeros(10_000), 1.0, 1e5, 2, Entropy(0))


@pytest.mark.parametrize(
    ("name", "options"), [*((n, {}) for n in DISTRIBUTED), ("poisson_binomial", {"levels": 8})]
)
@pytest.mark.parametrize("d", [3, 100, 5000])
def test_sums_of_codes_decode_to_means_with_the_stated_noise(
    name: str, options: dict[str, int], d: int
) -> None:
    n, clip, sigma = 20, 0.5, 2.0
    if name == "poisson_binomial" and d < 5000:  # few coordinates need many tosses
        options, sigma = {"levels": 200 if d == 3 else 8}, 4.0
    privacy = build("privacy", name, noise_multiplier=sigma, clip=clip, **options)
    encoder = privacy.encoder(Round(number=1, seed=0, cohort=n, size=d))
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(n, d)).astype(np.float32)
    truth = np.mean([clipped(v, clip) for v in vectors], axis=0)
    trials, errors = max(1, 1500 // d), []
    for trial in range(trials):
        total = np.zeros(encoder.count, np.int64)
        for i, vector in enumerate(vectors):
            codes = encoder.encode(vector, Entropy(trial * n + i))
            assert codes.dtype == np.int64
            assert 0 <= codes.min() <= codes.max() <= encoder.largest
            total = (total + codes) % (1 << encoder.bits)
        errors.append(encoder.decode(total, n) - truth)
    spread = np.std(errors) * n / (clip * sigma)
    assert 0.9 < spread < 1.1
    assert abs(np.mean(errors)) < 4 * clip * sigma / n / math.sqrt(trials * d)


def test_any_representative_of_a_sum_decodes_alike() -> None:
    encoder = build("privacy", "skellam", noise_multiplier=1.0).encoder(Round(1, 0, 3, 50))
    total = sum(encoder.encode(np.full(50, 0.1, np.float32), Entropy(s)) for s in range(3))
    assert isinstance(total, np.ndarray)
    one = encoder.decode(total % (1 << encoder.bits), 3)
    np.testing.assert_array_equal(encoder.decode(total, 3), one)
    np.testing.assert_array_equal(encoder.decode(total - (1 << encoder.bits), 3), one)


def test_neighbours_of_a_last_layer_do_not_share_a_piece() -> None:
    """All of an update in its last hundred coordinates must not exceed the codes."""
    d, n = 70_000, 4
    x = np.zeros(d, np.float32)
    x[-100:] = 0.1
    encoder = build("privacy", "skellam", noise_multiplier=0.05, bits=10).encoder(Round(1, 0, n, d))
    total = sum(encoder.encode(x, Entropy(s)) for s in range(n))
    assert isinstance(total, np.ndarray)
    noise = np.std(encoder.decode(total, n) - x) * n
    assert noise < 3 * 0.05 * encoder.l2 / encoder.scale


@pytest.mark.parametrize("name", ["discrete_gaussian", "skellam"])
def test_too_few_bits_say_how_many_are_needed(name: str) -> None:
    about = Round(number=1, seed=0, cohort=100, size=100_000)
    with pytest.raises(ConfigError, match=r"take at least 1[0-9]") as error:
        build("privacy", name, noise_multiplier=1.0, bits=6).encoder(about)
    least = int(str(error.value).split("take at least ")[1].split(",")[0])
    build("privacy", name, noise_multiplier=1.0, bits=least).encoder(about)


def test_too_few_levels_say_how_many_are_needed() -> None:
    about = Round(number=1, seed=0, cohort=100, size=1000)
    with pytest.raises(ConfigError, match="take at least 7") as error:
        build("privacy", "poisson_binomial", noise_multiplier=1.0).encoder(about)
    assert "levels=1 " in str(error.value)
    build("privacy", "poisson_binomial", noise_multiplier=1.0, levels=7).encoder(about)
