"""The fast coder: every sequence of integers has one code, and every code one sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedq import DecodeError
from fedq.codecs import _range, _rans
from fedq.codecs._range import MAX_MAGNITUDE, SIDE_BINS, SIDE_FLIP
from fedq.codecs.uniform import _side_table

HUGE = MAX_MAGNITUDE

magnitudes = st.one_of(
    st.integers(-2, 2),
    st.integers(-40, 40),
    st.integers(-HUGE, HUGE),
    st.sampled_from([0, 0, 0, HUGE, -HUGE]),
)


@st.composite
def problems(draw):
    tensors, parts = [], []
    for _ in range(draw(st.integers(1, 3))):
        columns = draw(st.integers(1, 40))
        size = columns * draw(st.integers(0, 5))
        tensors.append((size, columns))
        values = draw(st.lists(magnitudes, min_size=1, max_size=8))
        quiet = draw(st.integers(0, size))  # a stretch of zeros, longer than a run at times
        part = np.resize(np.array(values, np.int32), size)
        part[quiet : quiet + draw(st.integers(0, 100))] = 0
        parts.append(part)
    values = np.concatenate(parts)
    side = np.resize(
        np.array(draw(st.lists(st.integers(0, 31), min_size=1, max_size=9)), np.uint8), values.size
    )
    return values, tensors, side if draw(st.booleans()) else None


@settings(max_examples=150)
@given(problems())
def test_round_trip(problem):
    values, tensors, side = problem
    body = _rans.encode(values, tensors, 100 + 20 * values.size, side)
    assert body is not None
    assert np.array_equal(_rans.decode(body, tensors, side), values)
    assert _rans.encode(values, tensors, len(body), side) == body
    if len(body):
        assert body[0] != 0
        assert _rans.encode(values, tensors, len(body) - 1, side) is None


@settings(max_examples=300)
@given(st.binary(max_size=60), problems())
def test_what_decodes_is_what_an_encoder_writes(body, problem):
    _, tensors, side = problem
    try:
        values = _rans.decode(body, tensors, side)
    except DecodeError:
        return
    assert np.abs(values.astype(np.int64)).max(initial=0) <= HUGE
    assert _rans.encode(values, tensors, 200 + 40 * values.size, side) == body


@settings(max_examples=150)
@given(problems(), st.data())
def test_an_altered_code_is_refused_or_is_another_code(problem, data):
    values, tensors, side = problem
    body = _rans.encode(values, tensors, 100 + 20 * values.size, side)
    place = data.draw(st.integers(0, len(body)))
    altered = data.draw(
        st.sampled_from(
            [
                body[:place],
                body + bytes(place),
                body + b"\1",
                b"\0" * (1 + place % 5) + body,
                body[:place] + b"\x55" + body[place + 1 :],
                body[place:] + body[:place],
            ]
        )
    )
    try:
        other = _rans.decode(altered, tensors, side)
    except DecodeError:
        return
    assert _rans.encode(other, tensors, len(altered), side) == altered


@pytest.mark.parametrize("fill", [0, 1, 0x55, 0x80, 0xFF])
def test_long_bodies_are_refused(fill):
    with pytest.raises(DecodeError):
        _rans.decode(bytes([fill]) * 6001, [(1000, 10)])


def test_no_code_of_one_integer_goes_beyond_the_largest():
    """All bodies of two bytes, and some of six: raw bits may say more than an integer holds."""
    rng = np.random.default_rng(0)
    loud = np.full(40, HUGE, np.int32)
    code = _rans.encode(loud, [(40, 1)], 1000)
    bodies = [bytes([a, b]) for a in range(256) for b in range(0, 256, 5)]
    bodies += [bytes([*rng.integers(1, 256, 6)]) for _ in range(2000)]
    bodies += [bytes([*rng.integers(1, 256, 9)]) + code[9:] for _ in range(2000)]
    accepted = 0
    for body in bodies:
        for tensors in ([(1, 1)], [(40, 1)]):
            try:
                values = _rans.decode(body, tensors)
            except DecodeError:
                continue
            accepted += 1
            assert np.abs(values.astype(np.int64)).max() <= HUGE
            assert _rans.encode(values, tensors, 1000) == body
    assert accepted > 0


def _entropy_bytes(values):
    share = np.unique(values, return_counts=True)[1] / values.size
    return -values.size * (share * np.log2(share)).sum() / 8


@pytest.mark.parametrize("scale", [0.1, 0.4, 1.0, 5.0, 40.0, 30_000.0])
@pytest.mark.parametrize("source", ["normal", "laplace"])
def test_close_to_the_entropy(source, scale):
    rng = np.random.default_rng(0)
    n = 60_000
    values = np.rint(getattr(rng, source)(scale=scale, size=n)).astype(np.int32)
    entropy = _entropy_bytes(values)
    if scale > 100:  # far fewer integers than values they could have: the density tells
        entropy = n / 8 * (np.log2(scale) + {"normal": 2.0471, "laplace": 2.4427}[source])
    body = _rans.encode(values, [(n, 100)], 8 * n)
    assert len(body) < 1.02 * entropy + 120


def test_zeros_cost_next_to_nothing():
    n = 1 << 20
    values = np.zeros(n, np.int32)
    assert len(_rans.encode(values, [(n, 1024)], n)) < 50
    values[:: n // 100] = 1
    assert len(_rans.encode(values, [(n, 1024)], n)) < 400


def test_near_the_range_coder_on_rows_and_columns():
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.normal(-1, 2, (150, 1)) + rng.normal(-1, 2, (1, 200)))
    values = np.rint(rng.laplace(size=(150, 200)) * scale).astype(np.int32)
    fast = _rans.encode(values.ravel(), [(30_000, 200)], 80_000)
    assert len(fast) < 1.1 * len(_range.encode(values.ravel(), [(30_000, 200)], 80_000))
    shuffled = _rans.encode(rng.permutation(values.ravel()), [(30_000, 200)], 80_000)
    assert len(fast) < 0.9 * len(shuffled)


def test_a_small_model_pays_little_for_learning():
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(scale=0.7, size=5000)).astype(np.int32)
    body = _rans.encode(values, [(4800, 60), (60, 60), (140, 14)], 5000)
    assert len(body) < 1.08 * _entropy_bytes(values)


def test_side_information_helps():
    """The dither tells on which side of a border zero lies, and how near."""
    rng = np.random.default_rng(0)
    n = 50_000
    u = rng.random(n)
    values = np.floor(rng.normal(scale=0.3, size=n) + u).astype(np.int32)
    side = _side_table()[(u * 1024).astype(int)]
    assert side.max() < SIDE_BINS + SIDE_FLIP
    known = _rans.encode(values, [(n, 100)], n, side)
    assert len(known) < 0.8 * len(_rans.encode(values, [(n, 100)], n))


def test_inputs_stay_and_read_only_ones_work():
    values = np.arange(-50, 50, dtype=np.int32)
    side = (np.arange(100) % 32).astype(np.uint8)
    values.flags.writeable = side.flags.writeable = False
    body = _rans.encode(values, [(100, 10)], 1000, side)
    assert np.array_equal(_rans.decode(memoryview(body), [(100, 10)], side), values)


def test_frozen_code():
    values = np.array([0, 1, -1, 3, -7, 12, 100, -100, 5000, -HUGE, 0, 0, 2], np.int32)
    assert _rans.encode(values, [(13, 3)], 100).hex() == FROZEN


FROZEN = "01a0adbcea10d721db25ce4cbcfde99fdc1370905432c8"
