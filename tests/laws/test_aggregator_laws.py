"""Laws of every registered aggregator, and of the exact streaming mean."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedq import ConfigError, available, build
from fedq.aggregators import Aggregator
from fedq.aggregators.base import BLOCK_VALUES
from fedq.aggregators.mean import MeanStream
from fedq.registry import from_config, lookup, to_config

CASES = [
    pytest.param(build("aggregator", name, **options), id=f"{name}-{options}")
    for name in available("aggregator")
    for options in lookup("aggregator", name).examples
]
every = pytest.mark.parametrize("aggregator", CASES)


def normal(n: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def textbook(aggregator: Aggregator, updates: NDArray[np.float32], weights: list[float]) -> list:
    """The definition in plain Python, exact rationals, one coordinate at a time."""
    n, result = len(updates), []
    for column in updates.T.tolist():
        values = sorted(map(Fraction, column))
        if aggregator.name == "mean":
            total = sum(map(Fraction, weights))
            pairs = zip(column, weights, strict=True)
            exact = sum(Fraction(x) * Fraction(w) for x, w in pairs) / total
        elif aggregator.name == "median":
            exact = (values[(n - 1) // 2] + values[n // 2]) / 2
        else:
            k = math.floor(Fraction(str(aggregator.trim)) * n)
            exact = sum(values[k : n - k]) / Fraction(n - 2 * k)
        result.append(float(exact))
    return result


@every
def test_configuration_round_trips(aggregator: Aggregator) -> None:
    assert from_config("aggregator", to_config(aggregator)) == aggregator


@every
@pytest.mark.parametrize("n", [1, 2, 3, 10, 29])
def test_agrees_with_the_definition(aggregator: Aggregator, n: int) -> None:
    updates = normal(n, 7, n) * np.float32(10) ** np.arange(-3, 4, dtype=np.float32)
    weights = np.random.default_rng(n).integers(1, 500, n).astype(float)
    expected = np.array(textbook(aggregator, updates, weights.tolist())).astype(np.float32)
    assert np.allclose(aggregator(updates, weights), expected, rtol=2**-23, atol=1e-12)


@every
def test_result_is_one_float32_vector(aggregator: Aggregator) -> None:
    for n, d in [(1, 0), (1, 1), (4, 1), (3, 5000)]:
        result = aggregator(normal(n, d), np.ones(n))
        assert result.shape == (d,)
        assert result.dtype == np.float32


@every
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 999))
def test_order_of_clients_does_not_matter(aggregator: Aggregator, n: int, seed: int) -> None:
    updates, weights = normal(n, 9, seed), np.random.default_rng(seed).random(n) + 0.1
    order = np.random.default_rng(seed + 1).permutation(n)
    one, other = aggregator(updates, weights), aggregator(updates[order], weights[order])
    assert np.allclose(one, other, rtol=2**-22, atol=1e-9)


@every
def test_one_update_is_returned_as_it_is(aggregator: Aggregator) -> None:
    update = normal(1, 1000)
    assert np.array_equal(aggregator(update, np.array([3.7])), update[0])


@every
@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_equal_updates_are_returned_as_they_are(aggregator: Aggregator, n: int) -> None:
    update = normal(1, 100)
    weights = np.random.default_rng(0).random(n)
    assert np.array_equal(aggregator(np.repeat(update, n, axis=0), weights), update[0])


@every
def test_translation_and_scale_equivariance(aggregator: Aggregator) -> None:
    updates, weights = normal(11, 200), np.arange(1.0, 12.0)
    base = aggregator(updates, weights)
    for scale in (4.0, -0.5, 0.0):  # powers of two: exact
        assert np.array_equal(aggregator(updates * np.float32(scale), weights), base * scale)
    shift = normal(1, 200, 1)[0]
    assert np.allclose(aggregator(updates + shift, weights), base + shift, atol=1e-6)


@every
def test_weights_count_by_ratio_only(aggregator: Aggregator) -> None:
    updates, weights = normal(8, 50), np.arange(8.0)
    base = aggregator(updates, weights)
    for unit in (2.0**-1060, 2.0**-10, 2.0**1000):
        assert np.array_equal(aggregator(updates, weights * unit), base)


@every
@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 25), seed=st.integers(0, 999), size=st.sampled_from([1.0, 1e6, 3e38]))
def test_outliers_up_to_the_breakdown_point_stay_outside(
    aggregator: Aggregator, n: int, seed: int, size: float
) -> None:
    f = aggregator.breakdown(n)
    updates, rng = normal(n, 12, seed), np.random.default_rng(seed)
    hostile = rng.permutation(n)[:f]
    honest = np.delete(updates, hostile, axis=0)
    updates[hostile] = np.float32(size) * rng.choice([-1, 1], size=(f, 12)).astype(np.float32)
    result = aggregator(updates, np.ones(n))
    slack = 1e-6
    assert (result >= honest.min(axis=0) - slack).all()
    assert (result <= honest.max(axis=0) + slack).all()


def test_robust_rules_have_their_breakdown_points() -> None:
    assert [build("aggregator", "median").breakdown(n) for n in (1, 2, 3, 10, 11)] == [
        0,
        0,
        1,
        4,
        5,
    ]
    assert build("aggregator", "trimmed_mean", trim=0.29).breakdown(100) == 29
    assert build("aggregator", "trimmed_mean", trim=0.4999999999).breakdown(2) == 0
    assert build("aggregator", "mean").breakdown(10) == 0
    moved = build("aggregator", "mean")(np.array([[0], [0], [3e30]], np.float32), np.ones(3))
    assert moved[0] > 1e29


@every
def test_thousands_of_updates_lose_no_precision(aggregator: Aggregator) -> None:
    n = 20_000
    column = np.full((n, 1), 1e-3, np.float32)
    column[: n // 2] += np.float32(1e-3)  # float32 sums would be off by 1e-4 relative
    column[n // 2 - n // 8 : n // 2 + n // 8] = np.float32(1.7e-3)
    exact = textbook(aggregator, column, [1.0] * n)[0]
    assert aggregator(column, np.ones(n))[0] == pytest.approx(exact, rel=2**-23)


@every
def test_inputs_are_not_written_to(aggregator: Aggregator) -> None:
    for updates in (normal(5, 40), normal(1, 40), np.asfortranarray(normal(5, 40)), normal(5, 1)):
        before, weights = updates.copy(), np.ones(len(updates))
        updates.flags.writeable = weights.flags.writeable = False
        result = aggregator(updates, weights)
        result += 1
        assert np.array_equal(updates, before)


@every
def test_blocks_do_not_show(aggregator: Aggregator) -> None:
    d = BLOCK_VALUES // 4 + 3  # four clients: two blocks of columns
    updates = np.tile(normal(4, 1), (1, d))
    assert np.unique(aggregator(updates, np.ones(4))).size == 1


@every
@pytest.mark.parametrize(
    ("updates", "weights", "message"),
    [
        (np.ones(3), np.ones(3), "shape"),
        (np.ones((0, 3)), np.ones(0), "n >= 1"),
        (np.ones((2, 3)), np.ones(3), "weights must have shape"),
        (np.ones((2, 3)), np.ones((2, 1)), "weights must have shape"),
        (np.ones((2, 3)), [1, -1], "positive sum"),
        (np.ones((2, 3)), [0, 0], "positive sum"),
        (np.ones((2, 3)), [1, np.nan], "finite"),
        (np.ones((2, 3)), [1, np.inf], "finite"),
        ([[1.0], [np.nan]], [1, 1], "update 1"),
        ([[np.inf], [1.0]], [1, 1], "update 0"),
        ([[1e300], [1.0]], [1, 1], "update 0"),
        ([[1.0], [1.0, 2.0]], [1, 1], "numeric"),
        ([["a"], ["b"]], [1, 1], "numeric"),
    ],
)
def test_wrong_input_is_refused(aggregator: Aggregator, updates, weights, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aggregator(updates, weights)


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0, math.nan])
def test_trim_is_validated(trim: float) -> None:
    with pytest.raises(ConfigError, match=r"n > 2 \* floor\(trim \* n\)"):
        build("aggregator", "trimmed_mean", trim=trim)


# --- streams ------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("absent", [set(), {0}, {3, 4, 8}])
def test_a_stream_gives_the_aggregate_whatever_the_order(
    aggregator: Aggregator, absent: set[int]
) -> None:
    updates, weights = normal(9, 50), np.arange(1.0, 10.0)
    there = [slot for slot in range(9) if slot not in absent]
    results = []
    for order in (there, there[::-1], np.random.default_rng(1).permutation(there).tolist()):
        stream = aggregator.stream(50, capacity=9)
        for slot in order:
            update = updates[slot].copy()
            stream.add(update, weights[slot], slot)
            update[:] = np.nan  # the stream has its own copy
        results.append(stream.result())
    whole = aggregator(updates[there], weights[there])
    assert np.allclose(results[0], whole, rtol=2**-22, atol=2**-38)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@every
def test_a_refused_update_changes_nothing(aggregator: Aggregator) -> None:
    stream, update = aggregator.stream(3, capacity=2), np.array([1, 2, 3], np.float32)
    for bad in (update[:2], update.astype(float), update * np.float32(np.nan), update[None]):
        with pytest.raises(ConfigError):
            stream.add(bad, 1, slot=0)
    for weight in (-1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="weight"):
            stream.add(update, weight, slot=0)
    stream.add(update, 1, slot=0)
    assert np.array_equal(stream.result(), update)


@every
def test_an_empty_stream_has_no_result(aggregator: Aggregator) -> None:
    for capacity in (0, 5):
        with pytest.raises(ConfigError):
            aggregator.stream(3, capacity=capacity).result()
    with pytest.raises(ConfigError, match="d >= 0"):
        aggregator.stream(-1, capacity=1)


def test_a_mean_needs_no_memory_per_update_and_other_rules_say_what_they_lack() -> None:
    build("aggregator", "mean").stream(8, capacity=2**60)
    for name in ("median", "trimmed_mean"):
        with pytest.raises(ConfigError, match="clients_per_round"):
            build("aggregator", name).stream(8, capacity=2**60)


class Weighty(Aggregator):
    """Row numbers and weights, to see what a rule is given."""

    name = "weighty"

    def breakdown(self, n: int) -> int:
        return 0

    def _aggregate(self, updates: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray:
        return np.append(updates[:, 0], weights).astype(np.float32)


def test_rows_come_in_the_order_of_the_slots() -> None:
    stream = Weighty().stream(1, capacity=10)
    for slot in (7, 2, 9, 0):
        stream.add(np.array([slot], np.float32), slot + 100, slot)
    assert stream.result().tolist() == [0, 2, 7, 9, 100, 102, 107, 109]


def test_rows_have_one_update_per_slot_and_one_result() -> None:
    stream, update = build("aggregator", "median").stream(1, capacity=2), np.ones(1, np.float32)
    for slot in (-1, 2):
        with pytest.raises(ConfigError, match=f"slot {slot}"):
            stream.add(update, 1, slot)
    stream.add(update, 1, 1)
    with pytest.raises(ConfigError, match="slot 1"):
        stream.add(update, 1, 1)
    stream.result()
    with pytest.raises(ConfigError, match="ended"):
        stream.add(update, 1, 0)
    with pytest.raises(ConfigError, match="ended"):
        stream.result()


# --- the exact stream --------------------------------------------------------------------------

floats = st.floats(-(2.0**15), 2.0**15, width=32, exclude_min=True, exclude_max=True)
weights = st.one_of(st.integers(0, 2**20 - 1), st.integers(0, 2**30 - 1).map(lambda k: k / 2**10))
updates_and_weights = st.lists(
    st.tuples(st.lists(floats, min_size=3, max_size=3), weights), min_size=1, max_size=12
)


def run(pairs: list[tuple[list[float], float]]) -> MeanStream:
    stream = MeanStream(3)
    for update, weight in pairs:
        stream.add(np.array(update, np.float32), weight)
    return stream


def state(stream: MeanStream) -> tuple[bytes, bytes, float, int]:
    return stream._high.tobytes(), stream._low.tobytes(), stream.weight, stream.count


@settings(max_examples=200, deadline=None)
@given(pairs=updates_and_weights, data=st.data())
def test_stream_has_no_order(pairs, data) -> None:
    shuffled = data.draw(st.permutations(pairs))
    cut = data.draw(st.integers(0, len(pairs)))
    left, right = run(shuffled[:cut]), run(shuffled[cut:])
    right.merge(left)
    assert state(run(pairs)) == state(run(shuffled)) == state(right)


@settings(max_examples=200, deadline=None)
@given(pairs=updates_and_weights)
def test_stream_is_the_rounded_exact_mean(pairs) -> None:
    pairs.append(([0.5, -1e-9, 3.25], 1))  # some weight
    total = sum(Fraction(w) for _, w in pairs)
    result = run(pairs).result()
    for j in range(3):
        exact = sum(Fraction(float(np.float32(x[j]))) * Fraction(w) for x, w in pairs) / total
        error = abs(Fraction(float(result[j])) - exact)
        assert error <= abs(exact) * Fraction(1, 2**24) * (1 + Fraction(1, 2**20)) + Fraction(
            1, 2**62
        )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40), seed=st.integers(0, 999), scale=st.sampled_from([1e-9, 1e-3, 1.0, 3e3])
)
def test_stream_agrees_with_the_mean(n: int, seed: int, scale: float) -> None:
    updates = normal(n, 20, seed) * np.float32(scale)
    counts = np.random.default_rng(seed).integers(1, 1000, n)
    stream = MeanStream(20)
    for update, weight in zip(updates, counts, strict=True):
        stream.add(update, int(weight))
    mean = build("aggregator", "mean")(updates, counts)
    assert np.allclose(stream.result(), mean, rtol=2**-22, atol=scale * 2**-38)
    assert stream.count == n
    assert stream.weight == counts.sum()


def test_stream_keeps_small_updates() -> None:
    """Exact from 2**-38 up, below that within 2**-62."""
    for x in (1e-9, -1e-9, 2.0**-38, 1.1 * 2.0**-38, -(2.0**-61)):
        update = np.array([x], np.float32)
        stream = MeanStream(1)
        stream.add(update, 7)
        assert stream.result()[0] == update[0]
    stream = MeanStream(4)
    tiny = np.array([1e-15, -1e-15, 1e-45, -0.0], np.float32)
    stream.add(tiny, 1)
    assert np.abs(stream.result().astype(float) - tiny).max() <= 2.0**-62


def test_stream_holds_the_largest_sums() -> None:
    stream, top = MeanStream(2), np.nextafter(np.float32(2**15), np.float32(0))
    stream.add(np.array([top, -top], np.float32), 2**20 - 2**-10)
    for _ in range(20):  # double the stream up to its limit
        copy = MeanStream(2)
        copy.merge(stream)
        stream.merge(copy)
    assert stream.count == MeanStream.MAX_COUNT
    assert np.array_equal(stream.result(), [top, -top])
    with pytest.raises(ConfigError, match="at most"):
        stream.add(np.zeros(2, np.float32), 1)
    with pytest.raises(ConfigError, match="at most"):
        stream.merge(copy)


def test_stream_merges_with_itself() -> None:
    stream = run([([1.0, 2.0, -3.0], 2), ([0.5, 0.5, 0.5], 1)])
    before = stream.result()
    stream.merge(stream)
    assert stream.count == 4
    assert np.array_equal(stream.result(), before)


@pytest.mark.parametrize("bad", [2.0**15, -(2.0**15), 1e30, math.inf, -math.inf, math.nan])
def test_stream_refuses_what_it_cannot_hold_and_is_unchanged(bad: float) -> None:
    stream = run([([1.0, 2.0, 3.0], 1)])
    before = state(stream)
    with pytest.raises(ConfigError, match=r"2\*\*15"):
        stream.add(np.array([0.0, 1.0, bad], np.float32), 1)
    assert state(stream) == before


@pytest.mark.parametrize("weight", [-1, 2**20, math.nan, math.inf, 1e-6])
def test_stream_refuses_weights_out_of_range(weight: float) -> None:
    stream = MeanStream(1)
    with pytest.raises(ConfigError, match="weight"):
        stream.add(np.zeros(1, np.float32), weight)
    assert stream.count == 0


def test_stream_refuses_other_shapes_and_empty_means() -> None:
    stream = MeanStream(3)
    with pytest.raises(ConfigError, match="positive weight"):
        stream.result()
    for wrong in (np.zeros(4, np.float32), np.zeros(3), np.zeros((1, 3), np.float32)):
        with pytest.raises(ConfigError, match="expected float32"):
            stream.add(wrong, 1)
    with pytest.raises(ConfigError, match="merge"):
        stream.merge(MeanStream(4))
    with pytest.raises(ConfigError, match="d >= 0"):
        MeanStream(-1)


def test_stream_takes_strided_and_read_only_updates() -> None:
    both = normal(1, 6)[0]
    both.flags.writeable = False
    stream = MeanStream(3)
    stream.add(both[::2], 5)
    assert np.array_equal(stream.result(), both[::2])
