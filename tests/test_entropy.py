"""Chunks of entropy-coded integers: whole rows, bounded, independent of threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedq import DecodeError, wire
from fedq.codecs import _entropy, _range

shapes = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40)), max_size=5)


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_entropy, "CHUNK", 32)
        yield


def problem(shapes):
    tensors = [(rows * columns, columns) for rows, columns in shapes]
    n = sum(size for size, _ in tensors)
    values = (np.arange(n) ** 2 % 7 - 3).astype(np.int32)
    return values, tensors, (np.arange(n) % 32).astype(np.uint8)


@given(shapes)
def test_chunks_are_bounded_runs_of_whole_rows(shapes):
    _, tensors, _ = problem(shapes)
    pieces = _entropy.chunks(tensors)
    assert sum(size for piece in pieces for size, _ in piece) == sum(s for s, _ in tensors)
    for piece in pieces:
        assert sum(size for size, _ in piece) <= 32
    for size, width in (part for piece in pieces for part in piece):
        assert size % width == 0 or width == 32


@given(shapes, st.booleans())
def test_round_trip_for_any_number_of_threads(shapes, known):
    values, tensors, side = problem(shapes)
    side = side if known else None
    bodies = [
        _entropy.encode(values, tensors, 10_000, side, profile="max", threads=threads)
        for threads in (1, 3)
    ]
    assert bodies[0] == bodies[1]
    for threads in (1, 3):
        decoded = _entropy.decode(bodies[0], tensors, side, profile="max", threads=threads)
        assert decoded.dtype == np.int32
        assert np.array_equal(decoded, values)
    limit = len(bodies[0])
    assert _entropy.encode(values, tensors, limit, side, profile="max") == bodies[0]
    assert not limit or _entropy.encode(values, tensors, limit - 1, side, profile="max") is None


def test_one_chunk_pays_nothing_and_each_chunk_stands_alone():
    values, tensors, _ = problem([(6, 8)])
    first = _range.encode(values[:32], [(32, 8)], 1000)
    second = _range.encode(values[32:], [(16, 8)], 1000)
    body = _entropy.encode(values, tensors, 1000, profile="max")
    assert body == wire.varint(len(first)) + first + second
    assert _entropy.encode(values[:32], [(32, 8)], 1000, profile="max") == first


def test_hostile_lengths_are_refused():
    values, tensors, _ = problem([(6, 8)])
    body = _entropy.encode(values, tensors, 1000, profile="max")
    beyond = b"\x7f" + body[1:]
    huge = b"\xff" * 8 + b"\x7f" + body[1:]
    long_form = bytes([body[0] | 128, 0]) + body[1:]
    for altered in (b"", body[:1], beyond, huge, long_form, body + b"\0", body + bytes(99)):
        with pytest.raises(DecodeError):
            _entropy.decode(altered, tensors, profile="max")


@given(st.integers(0, 255), st.integers(-9, 0))
def test_what_decodes_is_what_an_encoder_writes(length, end):
    values, tensors, _ = problem([(6, 8)])
    body = _entropy.encode(values, tensors, 1000, profile="max")
    altered = bytes([length]) + body[1 : len(body) + end]
    try:
        decoded = _entropy.decode(altered, tensors, profile="max")
    except DecodeError:
        return
    assert _entropy.encode(decoded, tensors, 1000, profile="max") == altered


def test_without_a_coder_nothing_is_coded():
    values, tensors, _ = problem([(2, 8)])
    assert _entropy.encode(values, tensors, 1000, profile="packed") is None
    with pytest.raises(DecodeError, match="packed"):
        _entropy.decode(b"", tensors, profile="packed")
