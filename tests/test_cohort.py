"""Cohorts: drawn by place, as from a list of all that may be asked."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedq.cohort import Nodes, choose

ORDERS = st.one_of(
    st.integers(1, 60).map(lambda n: range(2, n + 2)),
    st.lists(st.integers(0, 2**63), min_size=1, max_size=60, unique=True),
)


@given(order=ORDERS, count=st.integers(0, 70), seed=st.integers(0, 2**32), data=st.data())
def test_a_cohort_is_that_of_the_list_without_the_barred(order, count, seed, data) -> None:
    barred = data.draw(st.sets(st.sampled_from(list(order))))
    left = [node for node in order if node not in barred]
    rng = np.random.default_rng(seed)
    places = rng.choice(len(left), min(count, len(left)), replace=False, shuffle=False)
    chosen = choose(Nodes(order), count, np.random.default_rng(seed), {*barred, 2**63 + 1})
    assert chosen == [left[place] for place in sorted(places)]


@given(order=ORDERS, count=st.integers(0, 70), seed=st.integers(0, 2**32), data=st.data())
def test_who_is_away_is_not_drawn(order, count, seed, data) -> None:
    nodes = Nodes(order)
    away = data.draw(st.sets(st.integers(0, len(order) - 1)))
    barred = data.draw(st.sets(st.sampled_from(list(order))))
    rng = np.random.default_rng(seed)
    chosen = choose(nodes, count, rng, barred, there=lambda place: place not in away)
    free = [node for place, node in enumerate(order) if place not in away and node not in barred]
    assert len(chosen) == min(count, len(free))
    assert set(chosen) <= set(free)
    assert [nodes[node] for node in chosen] == sorted(nodes[node] for node in chosen)


def test_all_that_are_there_are_drawn_alike() -> None:
    rng, nodes = np.random.default_rng(0), Nodes(range(2, 12))
    drawn = [choose(nodes, 3, rng, [4], there=lambda place: place != 7) for _ in range(4000)]
    counts = np.bincount(np.ravel(drawn), minlength=12)
    assert counts[[0, 1, 4, 9]].tolist() == [0, 0, 0, 0]
    assert np.delete(counts, [0, 1, 4, 9]) == pytest.approx(1500, abs=150)


def test_a_million_nodes_take_no_memory_of_their_own() -> None:
    choose(Nodes(range(10)), 3, np.random.default_rng(0))
    tracemalloc.start()
    nodes = Nodes(range(2, 1_000_002))
    chosen = choose(nodes, 100, np.random.default_rng(0), barred=[5, 6, 7])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(chosen) == 100
    assert peak < 100_000
    assert 1_000_002 not in nodes
    with pytest.raises(KeyError):
        nodes[1]
