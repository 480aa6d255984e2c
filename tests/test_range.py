"""The range coder: every sequence of integers has one code, and every code one sequence."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedq import DecodeError
from fedq.codecs import _range

HUGE = _range.MAX_MAGNITUDE

magnitudes = st.one_of(
    st.integers(-2, 2), st.integers(-40, 40), st.integers(-HUGE, HUGE), st.just(0)
)


@st.composite
def problems(draw):
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        columns = draw(st.integers(1, 6))
        tensors.append((columns * draw(st.integers(0, 5)), columns))
    n = sum(size for size, _ in tensors)
    values = np.array(draw(st.lists(magnitudes, min_size=n, max_size=n)), np.int32)
    side = np.array(draw(st.lists(st.integers(0, 31), min_size=n, max_size=n)), np.uint8)
    return values, tensors, side if draw(st.booleans()) else None


@settings(max_examples=150)
@given(problems())
def test_round_trip(problem):
    values, tensors, side = problem
    body = _range.encode(values, tensors, 100 + 20 * values.size, side)
    assert body is not None
    assert np.array_equal(_range.decode(body, tensors, side), values)
    if len(body):
        assert body[-1] != 0
        assert _range.encode(values, tensors, 200 + 40 * values.size, side) == body
        assert _range.encode(values, tensors, len(body) - 1, side) is None


@settings(max_examples=150)
@given(st.binary(max_size=60), problems())
def test_what_decodes_is_what_an_encoder_writes(body, problem):
    _, tensors, side = problem
    try:
        values = _range.decode(body, tensors, side)
    except DecodeError:
        return
    if np.abs(values.astype(np.int64)).max(initial=0) <= HUGE:
        assert _range.encode(values, tensors, 200 + 40 * values.size, side) == body


def test_a_code_with_anything_behind_it_is_refused():
    values = np.arange(-20, 20, dtype=np.int32)
    body = _range.encode(values, [(40, 8)], 1000)
    for tail in (b"\0", b"\1", b"\xff", b"\0\1", bytes(50)):
        with pytest.raises(DecodeError):
            _range.decode(body + tail, [(40, 8)])


def test_long_escapes_are_refused():
    refused = 0
    for fill in range(256):
        try:
            _range.decode(bytes([fill]) * 400, [(1000, 10)])
        except DecodeError:
            refused += 1
    assert refused == 256


def test_close_to_the_entropy():
    rng = np.random.default_rng(0)
    n = 30_000
    for scale in (0.1, 0.4, 1.0, 5.0, 40.0):
        values = np.rint(rng.laplace(scale=scale, size=n)).astype(np.int32)
        share = np.unique(values, return_counts=True)[1] / n
        entropy = -n * (share * np.log2(share)).sum() / 8
        body = _range.encode(values, [(n, 100)], 8 * n)
        assert len(body) < 1.03 * entropy + 40


def test_learns_rows_columns_and_tensors():
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.normal(0, 2, (150, 1)) + rng.normal(0, 2, (1, 200)))
    values = np.rint(rng.laplace(size=(150, 200)) * scale).astype(np.int32)
    shaped = _range.encode(values.ravel(), [(30_000, 200)], 80_000)
    shuffled = _range.encode(rng.permutation(values.ravel()), [(30_000, 200)], 80_000)
    assert len(shaped) < 0.9 * len(shuffled)


def test_a_small_model_pays_little_for_learning():
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(scale=0.7, size=5000)).astype(np.int32)
    share = np.unique(values, return_counts=True)[1] / 5000
    entropy = -5000 * (share * np.log2(share)).sum() / 8
    assert len(_range.encode(values, [(4800, 60), (60, 60), (140, 14)], 5000)) < 1.06 * entropy


def test_without_a_compiler_the_bytes_are_the_same():
    script = (
        "import numpy as np; from fedq.codecs import _range\n"
        "values = (np.arange(-60, 60) ** 3 // 4000).astype(np.int32)\n"
        "side = (np.arange(120) % 32).astype(np.uint8)\n"
        "body = _range.encode(values, [(90, 15), (30, 30)], 1000, side)\n"
        "assert np.array_equal(_range.decode(body, [(90, 15), (30, 30)], side), values)\n"
        "print(body.hex())"
    )
    bodies = {
        subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=os.environ | {"NUMBA_DISABLE_JIT": off},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for off in "01"
    }
    assert len(bodies) == 1


def test_compiled_coders_are_found_in_the_cache():
    for coder, decoding in ((_range._encoder, False), (_range._decoder, True)):
        kernel = getattr(coder, "py_func", coder)
        assert [cell.cell_contents for cell in kernel.__closure__] == [decoding]


def test_frozen_tables():
    squash, rates, levels, classes, strengths = (t.astype(np.int64) for t in _range._tables())
    exact = 65536 / (1 + np.exp(-np.arange(-704, 705) / 64))
    assert np.abs(squash - exact).max() < 0.51
    assert np.array_equal(squash + squash[::-1], np.full(1409, 65536))
    assert squash.min() == 1
    assert rates[0] == 8192
    assert rates[_range._SETTLED] == 512
    assert rates[-1] == 70
    assert np.array_equal(levels[:255], np.floor(8192 * np.log2(1 + np.arange(255))))
    assert classes[levels >> 4].tolist() == sorted(classes[levels >> 4])
    assert classes.max() == 15
    assert strengths[[0, 2, 3, 400, 401]].tolist() == [0, 0, 1, 6, 7]
