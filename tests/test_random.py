"""Streams that are the same on every machine, for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedq import random

FROZEN = {
    (0, ""): "404dde05c75644375c00695cdb4c7dd295992d8edb9c368f02e652cf4b71f5e4",
    (0, "dithered"): "71658346f87e15739aa370f4bfd9dfa3ca67c07452539a9a22a896781bcbe060",
    (1, ""): "4c9731461df74d8ea79d489e1c72546ddd6f60594a96df4111d3363c6e1750c4",
    (
        9223372036854775807,
        "golden",
    ): "06ea9c84206ed79a66b4cc383f8a94b11e361c8de6a441e9578f7e4484f1742f",
    (-1, ""): "e647d4ec791d2b9294bd95dee53ed64c8edc8196a0f235b32c94f7e9d62b7f23",
}


@pytest.mark.parametrize(("seed", "purpose"), FROZEN)
def test_words_are_frozen(seed, purpose):
    words = random.words(seed, 1001, purpose)
    assert hashlib.sha256(words.astype("<u4").tobytes()).hexdigest() == FROZEN[seed, purpose]


def test_derived_seeds_are_frozen():
    assert [random.derive(0), random.derive(1, 2, "sgd")] == [
        2033344993903900207,
        6477386141212763099,
    ]


@given(st.integers(-(2**70), 2**70), st.integers(0, 50), st.text(max_size=5))
def test_a_shorter_draw_is_a_prefix(seed, count, purpose):
    words = random.words(seed, 64, purpose)
    assert words.dtype == np.uint32
    assert np.array_equal(random.words(seed, count, purpose), words[:count])


def test_seeds_and_purposes_are_independent():
    draws = [
        random.words(seed, 4000, purpose) / 2**32 for seed in (0, 1, 2**63) for purpose in ("", "a")
    ]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 6 / np.sqrt(4000)


def test_derived_seeds_differ():
    paths = [(), (0,), (1,), ("0", "1"), (0, 1, "a"), (0, 1, "b"), (1, 0, "a")]
    seeds = {random.derive(root, *path) for root in (0, 1, -1) for path in paths}
    assert len(seeds) == 3 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_uniform_is_open_symmetric_and_exact():
    u = random.uniform(3, 200_000)
    assert u.dtype == np.float32
    grid = u.astype(np.float64) * 2**23 - 0.5
    assert np.array_equal(grid, np.rint(grid))
    assert grid.min() >= 0
    assert grid.max() < 2**23
    assert abs(u.mean(dtype=np.float64) - 0.5) < 6 / np.sqrt(12 * 200_000)
    assert abs(u.var(dtype=np.float64) - 1 / 12) < 0.001


def test_generator_repeats():
    assert random.generator(5).integers(1 << 60) == random.generator(5).integers(1 << 60)
