"""Laws of every registered aggregator, and of the exact streaming mean."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import tracemalloc
import types
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedq import ConfigError, available, build
from fedq.aggregators import Aggregator
from fedq.aggregators.blockwise import BLOCK_VALUES
from fedq.aggregators.mean import MeanStream
from fedq.registry import from_config, lookup, to_config
from tests import textbook

CASES = [
    pytest.param(build("aggregator", name, **options), id=f"{name}-{options}")
    for name in available("aggregator")
    for options in lookup("aggregator", name).examples
]
every = pytest.mark.parametrize("aggregator", CASES)


def normal(n: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def beside(aggregator: Aggregator, d: int) -> NDArray[np.float32] | None:
    """The server's own update, for rules that need one."""
    return normal(1, d, 77)[0] if aggregator.trusted_examples else None


def call(aggregator: Aggregator, updates: NDArray[np.float32], weights: Any) -> NDArray[np.float32]:
    return aggregator(updates, weights, beside(aggregator, np.shape(updates)[-1]))


def has_textbook(aggregator: Aggregator) -> bool:
    """All but bucketing: its permutation is its own."""
    return aggregator.name in textbook.RULES


@every
def test_configuration_round_trips(aggregator: Aggregator) -> None:
    assert from_config("aggregator", to_config(aggregator)) == aggregator


def test_every_rule_has_a_textbook_version() -> None:
    assert set(available("aggregator")) - set(textbook.RULES) == {"bucketing"}


@every
@pytest.mark.parametrize("n", [1, 2, 3, 10, 29])
def test_agrees_with_the_definition(aggregator: Aggregator, n: int) -> None:
    if not has_textbook(aggregator):
        return
    spread = np.float32(10) ** np.arange(-3, 4, dtype=np.float32)
    updates = normal(n, 7, n) * spread
    weights = np.random.default_rng(n).integers(1, 500, n).astype(float)
    expected = textbook.apply(aggregator, updates, weights, beside(aggregator, 7))
    precise = aggregator.name in ("mean", "median", "trimmed_mean")
    atol = 1e-12 if precise else 1e-6 * spread  # a mixed row is rounded to float32
    if "GeometricMedian" in repr(aggregator):
        atol = 1e-5 * np.abs(updates).max()  # its tolerance is of a distance
    found = call(aggregator, updates, weights)
    assert (np.abs(found - expected) <= 2**-23 * np.abs(expected) + atol).all()


@every
def test_result_is_one_float32_vector(aggregator: Aggregator) -> None:
    for n, d in [(1, 0), (1, 1), (4, 1), (3, 5000)]:
        result = call(aggregator, normal(n, d), np.ones(n))
        assert result.shape == (d,)
        assert result.dtype == np.float32


@every
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 999))
def test_order_of_clients_does_not_matter(aggregator: Aggregator, n: int, seed: int) -> None:
    if (aggregator.name, n) == ("krum", 2):
        return  # each is as near to the other
    updates, weights = normal(n, 9, seed), np.random.default_rng(seed).random(n) + 0.1
    order = np.random.default_rng(seed + 1).permutation(n)
    one = call(aggregator, updates, weights)
    other = call(aggregator, updates[order], weights[order])
    assert np.allclose(one, other, rtol=2**-20, atol=1e-6)


@every
def test_one_update_is_returned_as_it_is(aggregator: Aggregator) -> None:
    if aggregator.name in ("sign_vote", "fltrust"):
        return  # a vote has no size, and trust has the server's
    update = normal(1, 1000)
    assert np.array_equal(call(aggregator, update, np.array([3.7])), update[0])


@every
@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_equal_updates_are_returned_as_they_are(aggregator: Aggregator, n: int) -> None:
    if aggregator.name in ("sign_vote", "fltrust"):
        return
    update = normal(1, 100)
    weights = np.random.default_rng(0).random(n)
    assert np.array_equal(call(aggregator, np.repeat(update, n, axis=0), weights), update[0])


@every
def test_zero_updates_are_no_update(aggregator: Aggregator) -> None:
    for n in (1, 2, 9):
        assert not call(aggregator, np.zeros((n, 8), np.float32), np.ones(n)).any()


@every
def test_translation_and_scale_equivariance(aggregator: Aggregator) -> None:
    updates, weights = normal(11, 200), np.arange(1.0, 12.0)
    base = call(aggregator, updates, weights)
    if aggregator.scales:
        for scale in (4.0, -0.5, 0.0):  # powers of two: exact
            found = call(aggregator, updates * np.float32(scale), weights)
            if aggregator.name == "bucketing":  # the updates decide the permutation
                continue
            assert np.allclose(found, base * scale, rtol=2**-22, atol=1e-6)
    if aggregator.translates and aggregator.name != "bucketing":
        shift = normal(1, 200, 1)[0]
        assert np.allclose(call(aggregator, updates + shift, weights), base + shift, atol=2e-6)


@every
def test_weights_count_by_ratio_only(aggregator: Aggregator) -> None:
    updates, weights = normal(8, 50), np.arange(8.0)
    base = call(aggregator, updates, weights)
    for unit in (2.0**-1060, 2.0**-10, 2.0**1000):
        assert np.array_equal(call(aggregator, updates, weights * unit), base)


@every
def test_weights_count_in_a_mean_and_not_in_a_robust_rule(aggregator: Aggregator) -> None:
    updates = normal(8, 50)
    claims = np.array([1e5, 1, 1, 1, 1, 1, 1, 1])
    same = np.array_equal(call(aggregator, updates, claims), call(aggregator, updates, np.ones(8)))
    assert same == (aggregator.name not in ("mean", "norm_bounded"))


@every
@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 25), seed=st.integers(0, 999), size=st.sampled_from([1.0, 1e6, 3e38]))
def test_outliers_up_to_the_breakdown_point_are_bounded(
    aggregator: Aggregator, n: int, seed: int, size: float
) -> None:
    f = min(aggregator.breakdown(n), n)
    updates, rng = normal(n, 12, seed), np.random.default_rng(seed)
    hostile = rng.permutation(n)[:f]
    honest = np.delete(updates, hostile, axis=0)
    updates[hostile] = np.float32(size) * rng.choice([-1, 1], size=(f, 12)).astype(np.float32)
    result = call(aggregator, updates, np.ones(n))
    slack = 1e-6
    if aggregator.keeps_range:
        assert (result >= honest.min(axis=0) - slack).all()
        assert (result <= honest.max(axis=0) + slack).all()
    norms = np.linalg.norm(honest, axis=1)
    own = beside(aggregator, 12)
    largest = max([*norms.tolist(), 0.0 if own is None else float(np.linalg.norm(own))])
    assert np.linalg.norm(result.astype(float)) <= 5 * largest


@every
@settings(max_examples=20, deadline=None)
@given(n=st.integers(8, 25), seed=st.integers(0, 999))
def test_a_far_cluster_of_colluders_is_left_out(aggregator: Aggregator, n: int, seed: int) -> None:
    """They agree with each other more than honest updates do, and are still a minority."""
    f = min(aggregator.breakdown(n), (n - 1) // 2)
    updates = 1 + normal(n, 12, seed)
    updates[:f] = -50 + 1e-3 * normal(f, 12, seed)
    if f == 0 or aggregator.trusted_examples or aggregator.name in ("norm_bounded", "sign_vote"):
        return  # some have other means of knowing, some only bound
    result = call(aggregator, updates, np.ones(n))
    assert np.linalg.norm(result - 1) < np.linalg.norm(updates[f:] - 1, axis=1).max() * 2


@pytest.mark.parametrize("name", ["mean", "multi_krum", "dnc", "nearest_neighbour_mixing"])
def test_without_hostile_updates_it_is_the_mean(name: str) -> None:
    inner = {"inner": {"name": "trimmed_mean", "trim": 0.0}} if "mixing" in name else {}
    options = {} if name == "mean" else {"f": 0, **inner}
    updates = normal(9, 30)
    found = build("aggregator", name, **options)(updates, np.ones(9))
    assert np.allclose(found, updates.mean(axis=0, dtype=float), atol=1e-7)


@pytest.mark.parametrize(
    ("name", "n", "f", "formula"),
    [
        ("krum", 10, 4, "2 f + 3"),
        ("multi_krum", 10, 4, "2 f + 3"),
        ("bulyan", 10, 2, "4 f + 3"),
        ("nearest_neighbour_mixing", 10, 5, "2 f + 1"),
        ("monna", 10, 5, "2 f + 1"),
        ("dnc", 10, 5, "2 f + 1"),
    ],
)
def test_too_many_hostile_updates_are_refused_with_the_formula(
    name: str, n: int, f: int, formula: str
) -> None:
    rule = build("aggregator", name, f=f, **({"inner": "median"} if "mixing" in name else {}))
    with pytest.raises(ConfigError, match=f"n >= {re.escape(formula)} updates, and has n = {n}, f"):
        call(rule, normal(n, 3), np.ones(n))
    enough = int(formula[0]) * f + int(formula[-1])
    call(rule, normal(enough, 3), np.ones(enough))
    with pytest.raises(ConfigError, match=f"n = {enough - 1}"):
        call(rule, normal(enough - 1, 3), np.ones(enough - 1))
    assert rule.breakdown(enough) == f
    for bad in (-1, 0.5, 1.0, math.nan):
        with pytest.raises(ConfigError, match=re.escape(formula)):
            build("aggregator", name, f=bad)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("norm_bounded", {"multiple": 0.0}, "multiple must be positive"),
        ("norm_bounded", {"bound": -1.0}, "bound must be positive"),
        ("geometric_median", {"tolerance": 0.0}, r"tolerance must lie in \(0, 1\)"),
        ("geometric_median", {"iterations": 0}, "iterations must be at least 1"),
        ("centered_clipping", {"radius": math.inf}, "radius must be positive"),
        ("centered_clipping", {"multiple": math.nan}, "multiple must be positive"),
        ("centered_clipping", {"iterations": 0}, "iterations must be at least 1"),
        ("bucketing", {"size": 0}, "size must be at least 1"),
        ("bucketing", {"inner": "fltrust"}, "fltrust cannot stand inside bucketing"),
        ("nearest_neighbour_mixing", {"inner": "sign_vote"}, "sign_vote cannot stand inside"),
        ("fltrust", {"root_examples": 0}, "root_examples must be at least 1"),
        ("sign_vote", {"step": 0.0}, "step must be positive"),
    ],
)
def test_options_are_validated(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("aggregator", name, **options)


def test_a_rule_with_trust_needs_the_server_s_update() -> None:
    for name in ("fltrust", "monna"):
        rule, updates = build("aggregator", name), normal(4, 3)
        with pytest.raises(ConfigError, match="needs the server's own update"):
            rule(updates, np.ones(4))
        for bad in (np.ones(3), np.ones(4, np.float32), np.array([1, np.nan, 1], np.float32)):
            with pytest.raises(ConfigError, match=r"expected float32|NaN"):
                rule(updates, np.ones(4), bad)
        assert rule.for_state.name == "median"


def test_the_geometric_median_is_a_minimum() -> None:
    rule = build("aggregator", "geometric_median")
    for seed in range(20):
        updates = normal(7, 3, seed) * np.float32(10) ** (seed % 5 - 2)

        def cost(x: NDArray[Any], rows: NDArray[Any] = updates) -> float:
            return float(np.linalg.norm(rows - x, axis=1).sum())

        found, unit = rule(updates, np.ones(7)).astype(float), np.abs(updates).max()
        for step in np.eye(3) * 1e-3 * unit:
            assert cost(found) <= cost(found + step)
            assert cost(found) <= cost(found - step)


def test_a_bucket_spoils_its_mean_only_and_buckets_change() -> None:
    rule = build("aggregator", "bucketing", size=2, inner="median")
    updates = normal(12, 40)
    updates[0] = 1e6
    assert np.abs(rule(updates, np.ones(12))).max() < 4
    other = build("aggregator", "bucketing", size=2, inner="median", seed=1)
    assert not np.array_equal(rule(updates, np.ones(12)), other(updates, np.ones(12)))
    alone = build("aggregator", "bucketing", size=1, inner="median")
    assert np.array_equal(
        alone(updates, np.ones(12)), build("aggregator", "median")(updates, np.ones(12))
    )


@every
def test_memory_is_a_fraction_of_the_input(aggregator: Aggregator) -> None:
    updates = normal(100, 60_000)
    call(aggregator, updates, np.ones(100))  # compiled
    tracemalloc.start()
    try:
        call(aggregator, updates, np.ones(100))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = 8 * BLOCK_VALUES + 4 * BLOCK_VALUES  # a block in float64, and its copy
    assert peak < 2 * held + 20 * updates.shape[1] + 8 * 20 * 100 * 100


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


@pytest.mark.parametrize("name", ["mean", "median", "trimmed_mean"])
def test_thousands_of_updates_lose_no_precision(name: str) -> None:
    n, aggregator = 20_000, build("aggregator", name)
    column = np.full((n, 1), 1e-3, np.float32)
    column[: n // 2] += np.float32(1e-3)  # float32 sums would be off by 1e-4 relative
    column[n // 2 - n // 8 : n // 2 + n // 8] = np.float32(1.7e-3)
    exact = textbook.apply(aggregator, column, [1.0] * n, None)[0]
    assert aggregator(column, np.ones(n))[0] == pytest.approx(exact, rel=2**-23)


@every
def test_inputs_are_not_written_to(aggregator: Aggregator) -> None:
    for updates in (normal(5, 40), normal(1, 40), np.asfortranarray(normal(5, 40)), normal(5, 1)):
        before, weights = updates.copy(), np.ones(len(updates))
        updates.flags.writeable = weights.flags.writeable = False
        result = call(aggregator, updates, weights)
        result += 1
        assert np.array_equal(updates, before)


@every
def test_blocks_do_not_show(aggregator: Aggregator) -> None:
    d = BLOCK_VALUES // 4 + 3  # four clients: two blocks of columns
    updates = np.tile(normal(4, 1), (1, d))
    if aggregator.trusted_examples:
        return  # the reference is another in each column
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
        stream = aggregator.stream(50, 9, beside(aggregator, 50))
        for slot in order:
            update = updates[slot].copy()
            stream.add(update, weights[slot], slot)
            update[:] = np.nan  # the stream has its own copy
        results.append(stream.result())
    whole = call(aggregator, updates[there], weights[there])
    assert np.allclose(results[0], whole, rtol=2**-22, atol=2**-38)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@every
def test_a_refused_update_changes_nothing(aggregator: Aggregator) -> None:
    own = beside(aggregator, 3)
    stream, update = aggregator.stream(3, 2, own), np.array([1, 2, 3], np.float32)
    for bad in (update[:2], update.astype(float), update * np.float32(np.nan), update[None]):
        with pytest.raises(ConfigError):
            stream.add(bad, 1, slot=0)
    for weight in (-1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="weight"):
            stream.add(update, weight, slot=0)
    stream.add(update, 1, slot=0)
    assert np.array_equal(stream.result(), call(aggregator, update[None], [1]))


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


# --- ByzFL as an oracle ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byzfl() -> dict[str, Any]:
    """The aggregators of ByzFL (Gonzalez et al. 2025), without its package's own imports.

    Its ``__init__`` needs torchvision, its rules do not: ``pip install --no-deps byzfl``.
    """
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("byzfl is not installed")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    found = {}
    for module in ("aggregators", "preaggregators"):
        found |= vars(importlib.import_module(f"byzfl.aggregators.{module}"))
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("mean", {}, ("Average", {})),
        ("median", {}, ("Median", {})),
        ("trimmed_mean", {"trim": 0.2}, ("TrMean", {"f": 4})),
        # ByzFL sums over n - f - 1 neighbours, the paper over n - f - 2.
        ("krum", {"f": 4}, ("Krum", {"f": 5})),
    ],
)
def test_agrees_with_byzfl(
    byzfl: dict[str, Any], name: str, options: dict[str, Any], theirs: Any, seed: int
) -> None:
    updates = normal(20, 50, seed)
    expected = byzfl[theirs[0]](**theirs[1])(updates)
    found = build("aggregator", name, **options)(updates, np.ones(20))
    assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_mixing_and_trust_agree_with_byzfl(byzfl: dict[str, Any], seed: int) -> None:
    updates = normal(20, 50, seed)
    mixed = byzfl["NNM"](f=4)(updates)
    rule = build("aggregator", "nearest_neighbour_mixing", f=4, inner="median")
    expected = byzfl["Median"]()(mixed)
    assert np.allclose(rule(updates, np.ones(20)), expected, atol=1e-6)
    nearest = byzfl["MoNNA"](f=4, idx=3)(updates)
    monna = build("aggregator", "monna", f=4)
    assert np.allclose(monna(updates, np.ones(20), updates[3]), nearest, atol=1e-6)
