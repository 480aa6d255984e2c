"""Laws of every registered partition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedq import ConfigError, available, build
from fedq.data.partitions import Partition
from fedq.data.partitions.base import Disjoint, Parts, Shares
from fedq.registry import from_config, lookup, to_config

CASES = [
    pytest.param(build("partition", name, **options), id=f"{name}-{options}")
    for name in available("partition")
    for options in lookup("partition", name).examples
]
every = pytest.mark.parametrize("partition", CASES)
disjoint = pytest.mark.parametrize(
    "partition", [case for case in CASES if isinstance(case.values[0], Disjoint)]
)
LABELS = np.random.default_rng(0).permutation(np.arange(4000) % 10)


def split(partition: Partition, labels: NDArray[np.int64], clients: int, seed: int = 0) -> Parts:
    """Split with as many client ids as ``natural`` needs."""
    groups = np.random.default_rng(1).permutation(np.arange(len(labels)) % (clients + 3))
    if len(labels) < clients + 3:
        groups = np.arange(len(labels))
    return partition.split(labels, clients, seed, groups)


def class_shares(parts: Parts, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (clients, classes): which part of a client's rows is of a class."""
    counts = np.array([np.bincount(labels[part], minlength=10) for part in parts], float)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


@every
def test_configuration_round_trips(partition: Partition) -> None:
    assert from_config("partition", to_config(partition)) == partition


@disjoint
@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=200).map(np.array),
    clients=st.integers(1, 40),
    seed=st.integers(-5, 2**63),
)
def test_parts_are_disjoint_complete_sorted(
    partition: Partition, labels: NDArray[np.int64], clients: int, seed: int
) -> None:
    if partition.name == "natural":
        clients = min(clients, len(labels))
    parts = split(partition, labels, clients, seed)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and part.ndim == 1 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@every
def test_seed_decides(partition: Partition) -> None:
    one, again, other = (split(partition, LABELS, 50, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@every
def test_inputs_are_not_written_to(partition: Partition) -> None:
    labels, groups = LABELS.copy(), np.arange(4000) % 70
    labels.flags.writeable = groups.flags.writeable = False
    partition.split(labels, 50, 0, groups)


@disjoint
def test_more_clients_than_rows(partition: Partition) -> None:
    if partition.name == "natural":
        with pytest.raises(ConfigError, match="at most 4000"):
            split(partition, LABELS, 10_000)
        return
    parts = partition.split(LABELS, 10_000, 0)
    assert len(parts) == 10_000
    assert sum(part.size for part in parts) == 4000


@disjoint
def test_one_client_gets_everything(partition: Partition) -> None:
    (part,) = split(partition, LABELS, 1)
    assert np.array_equal(part, np.arange(4000))


@every
@pytest.mark.parametrize(
    ("labels", "clients", "groups", "message"),
    [
        (np.zeros(0, int), 3, None, "at least one row"),
        (np.zeros((3, 1), int), 3, None, "integer labels"),
        (np.zeros(3), 3, None, "integer labels"),
        (np.zeros(3, int), 0, None, "clients must be at least 1"),
        (np.zeros(3, int), 2, np.zeros(4, int), "3 rows"),
    ],
)
def test_wrong_arguments_are_refused(
    partition: Partition, labels, clients: int, groups, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        partition.split(labels, clients, 0, groups)


@every
def test_sizes_are_those_of_the_rows(partition: Partition) -> None:
    parts = split(partition, LABELS, 60, seed=3)
    filled = [part for part in parts if part.size]
    assert parts.sizes.tolist() == [part.size for part in parts]
    for kept in (parts.filled(), Shares.of(parts).filled()):
        assert all(np.array_equal(*both) for both in zip(kept, filled, strict=True))
    with pytest.raises(IndexError):
        parts[60]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=3, max_size=200).map(np.array),
    client=st.integers(0, 10**9),
    alpha=st.sampled_from([None, 1e-3, 0.1, 10.0]),
    seed=st.integers(-5, 2**63),
)
def test_a_client_draws_its_rows_whatever_the_others(
    labels: NDArray[np.int64], client: int, alpha: float | None, seed: int
) -> None:
    draws = build("partition", "draws", rows=3, alpha=alpha)
    rows = draws.split(labels, 10**9 + 1, seed)[client]
    assert np.unique(rows).size == rows.size == 3
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < labels.size
    assert np.array_equal(rows, draws.split(labels, client + 1, seed)[client])


def test_draws_follow_the_classes_of_the_data_and_alpha() -> None:
    labels = np.repeat([0, 1, 2, 3], [400, 300, 200, 100])
    for alpha in (None, 1e4, 0.05):
        parts = build("partition", "draws", rows=50, alpha=alpha).split(labels, 400, 0)
        shares = np.array([np.bincount(labels[part], minlength=4) for part in parts]) / 50
        assert shares.mean(axis=0) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.05)
        assert (np.mean(shares.max(axis=1) > 0.9) > 0.7) == (alpha == 0.05)
    with pytest.raises(ConfigError, match=r"partition\.rows"):
        build("partition", "draws", rows=6).split(np.arange(5), 2, 0)


def test_iid_shares_are_equal_in_size_and_classes() -> None:
    parts = build("partition", "iid").split(LABELS, 20, 0)
    assert {part.size for part in parts} == {200}
    assert np.abs(class_shares(parts, LABELS) - 0.1).max() < 0.1
    sizes = [part.size for part in build("partition", "iid").split(LABELS[:103], 10, 0)]
    assert max(sizes) - min(sizes) == 1


def test_dirichlet_approaches_iid_for_large_alpha() -> None:
    parts = build("partition", "dirichlet", alpha=1e6).split(LABELS, 20, 0)
    assert np.abs(class_shares(parts, LABELS) - 0.1).max() < 0.01
    assert np.ptp([part.size for part in parts]) <= 12


def test_dirichlet_concentrates_for_small_alpha() -> None:
    largest = {}
    for alpha in (1e-3, 0.1, 1.0, 100.0):
        partition = build("partition", "dirichlet", alpha=alpha, min_examples=0)
        held = np.zeros((20, 10))
        for seed in range(5):
            parts = partition.split(LABELS, 20, seed)
            held += np.array([np.bincount(LABELS[p], minlength=10) for p in parts])
            top = np.sort(np.array([np.bincount(LABELS[p], minlength=10) for p in parts]), axis=0)
            largest.setdefault(alpha, []).append(top[-1].mean() / 400)
    means = [np.mean(largest[alpha]) for alpha in (1e-3, 0.1, 1.0, 100.0)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.9  # one client holds nearly the whole class
    assert means[-1] < 0.1


def test_dirichlet_matches_the_moments_of_its_distribution() -> None:
    """E[p] = 1/c and Var[p] = (1/c)(1 - 1/c) / (c alpha + 1), over many classes."""
    clients, alpha = 5, 0.7
    labels = np.repeat(np.arange(400), 200)
    parts = build("partition", "dirichlet", alpha=alpha, min_examples=0).split(labels, clients, 0)
    shares = np.array([np.bincount(labels[part], minlength=400) for part in parts]) / 200
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert shares.mean(axis=1) == pytest.approx([0.2] * 5, abs=0.03)
    assert shares.var() == pytest.approx(expected, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300),
    clients=st.integers(1, 60),
    minimum=st.integers(0, 6),
    alpha=st.sampled_from([1e-3, 0.1, 10.0]),
)
def test_dirichlet_guarantees_its_minimum(n: int, clients: int, minimum: int, alpha: float) -> None:
    partition = build("partition", "dirichlet", alpha=alpha, min_examples=minimum)
    sizes = [part.size for part in partition.split(np.arange(n) % 4, clients, 0)]
    assert sum(sizes) == n
    if n >= clients * minimum:
        assert min(sizes) >= minimum


def test_dirichlet_takes_from_the_largest_only() -> None:
    labels = np.arange(1000) % 3
    bare = build("partition", "dirichlet", alpha=0.05, min_examples=0).split(labels, 30, 4)
    filled = build("partition", "dirichlet", alpha=0.05, min_examples=2).split(labels, 30, 4)
    before, after = (np.array([part.size for part in parts]) for parts in (bare, filled))
    assert (after[before < 2] == 2).all()
    lost = before > after
    assert lost.any()
    assert after[lost].min() >= after[~lost].max() - 1


def test_shards_limit_the_classes_of_a_client() -> None:
    labels = np.sort(LABELS)
    for shards in (1, 2, 3):
        partition = build("partition", "shards", shards_per_client=shards)
        parts = partition.split(labels, 20, 0)  # 20 * shards shards divide 400 rows per class
        assert {part.size for part in parts} == {200} or shards == 3
        classes = [np.unique(labels[part]).size for part in parts]
        assert max(classes) <= 2 * shards
        if 400 % (200 // shards) == 0:  # no shard spans two classes
            assert max(classes) <= shards


def test_natural_keeps_clients_apart() -> None:
    natural = build("partition", "natural")
    ids = np.random.default_rng(0).integers(0, 12, 500) * 7  # ids need not be 0..n-1
    labels = np.zeros(500, int)
    parts = natural.split(labels, 12, 3, ids)
    assert [np.unique(ids[part]).tolist() for part in parts] == [[7 * i] for i in range(12)]
    parts = natural.split(labels, 5, 3, ids)
    held = [set(ids[part].tolist()) for part in parts]
    assert sum(map(len, held)) == len(set.union(*held)) == 12
    assert sorted(map(len, held)) == [2, 2, 2, 3, 3]


def test_natural_says_what_it_lacks() -> None:
    natural = build("partition", "natural")
    with pytest.raises(ConfigError, match="client_train"):
        natural.split(LABELS, 5, 0)
    with pytest.raises(ConfigError, match="at most 3"):
        natural.split(np.zeros(6, int), 5, 0, np.arange(6) % 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dirichlet", {"alpha": 0.0}),
        ("dirichlet", {"alpha": float("inf")}),
        ("dirichlet", {"alpha": float("nan")}),
        ("dirichlet", {"min_examples": -1}),
        ("shards", {"shards_per_client": 0}),
        ("draws", {"rows": 0}),
        ("draws", {"alpha": -1.0}),
    ],
)
def test_options_are_validated(name: str, options) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build("partition", name, **options)
