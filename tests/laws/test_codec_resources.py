"""What a decoder may cost, and what an encoder may be given, for every registered codec.

Memory is what is allocated while a payload is decoded, by NumPy or by kernels (tracemalloc sees
both). No law asserts a time.
"""

from __future__ import annotations

import tracemalloc
from functools import cache

import numpy as np
import pytest

from fedq import DecodeError, Layout, build, codecs, wire
from fedq.codecs import Codec
from fedq.codecs._groups import pieces, spread
from fedq.errors import ConfigError
from fedq.registry import table

CASES = [
    pytest.param(build("codec", name, **example), id=f"{name}-{index}")
    for name, cls in table("codec").items()
    for index, example in enumerate(cls.examples)
]
every_codec = pytest.mark.parametrize("codec", CASES)

LAYOUT = Layout(("weight", "bias"), ((512, 511), (512,)))  # 2**18 coordinates
#: What the coders' own tables take, whatever d is.
FIXED_BYTES = 1 << 19
#: Bytes that decoding may allocate, in float32 vectors of the layout: four, and a copy of the body.
ALLOWED = 4.5
#: Codecs that take more today: a debt to be paid, which must not grow.
OWED = {"correlated": 6.0}  # levels of all coordinates in float64


def laplace(size: int) -> np.ndarray:
    return (np.random.default_rng(0).laplace(size=size) ** 3 / 100).astype(np.float32)


@cache
def payload_of(codec: Codec) -> bytes:
    return codec.encode(laplace(LAYOUT.size), LAYOUT, seed=1)


def peak_bytes(payload: bytes, layout: Layout) -> int:
    """Decode a payload, hostile or not; return the most that was allocated meanwhile."""
    tracemalloc.start()
    try:
        codecs.decode(payload, layout)
    except DecodeError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def limit(codec: Codec, layout: Layout) -> float:
    return FIXED_BYTES + OWED.get(codec.name, ALLOWED) * 4 * layout.size


@every_codec
def test_memory_of_a_decoder_is_bounded(codec):
    payload = payload_of(codec)
    codecs.decode(payload, LAYOUT)  # compiles
    assert peak_bytes(payload, LAYOUT) <= limit(codec, LAYOUT)


@every_codec
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\x55"])
def test_bombs_cost_no_more(codec, fill):
    """Bodies as long as the codec's bound, cut ones, and ones that start as they should."""
    body = bytes(wire.open_frame(payload_of(codec), LAYOUT).body)
    whole = codec.max_body_bytes(LAYOUT)
    for bomb in (fill * whole, body[:40] + fill * (whole - 40), body[: len(body) // 2], b""):
        payload = wire.seal_frame(codec, LAYOUT, 1, bomb[:whole])
        assert peak_bytes(payload, LAYOUT) <= limit(codec, LAYOUT)


@every_codec
def test_too_long_a_body_is_refused_unread(codec):
    body = bytes(codec.max_body_bytes(LAYOUT) + 1)
    payload = wire.seal_frame(codec, LAYOUT, 1, body)
    with pytest.raises(DecodeError, match="too long"):
        codecs.decode(payload, LAYOUT)
    assert peak_bytes(payload, LAYOUT) < 2 * 4 * LAYOUT.size


def test_the_law_of_memory_can_fail(monkeypatch):
    codec = build("codec", "identity")
    decode = type(codec)._decode

    def wasteful(self, body, layout, seed):
        np.zeros(8 * layout.size, np.float32)
        return decode(self, body, layout, seed)

    monkeypatch.setattr(type(codec), "_decode", wasteful)
    assert peak_bytes(payload_of(codec), LAYOUT) > limit(codec, LAYOUT)


@pytest.mark.slow
def test_sixteen_million_coordinates():
    layout = Layout(("w",), ((4096, 4096),))
    x = laplace(layout.size)
    codec = build("codec", "ternary")
    payload = codec.encode(x, layout, seed=1)
    assert peak_bytes(payload, layout) <= limit(codec, layout)
    y = codec.decode(payload, layout)
    assert set(np.unique(np.abs(y))) == {0, np.abs(x).max()}


@pytest.mark.parametrize("sizes", [[70_000, 1, 3], [1] * 20_000, [16_384, 16_384], []])
def test_pieces_are_what_spread_gives(sizes):
    groups = np.array(sizes, np.int64)
    values = np.arange(groups.size, dtype=np.float32)
    found = [(part, piece) for part, piece in pieces(values, groups)]
    assert np.array_equal(np.concatenate([[], *(p for _, p in found)]), spread(values, groups))
    assert [part.stop - part.start for part, _ in found] == [piece.size for _, piece in found]


# --- what an encoder is given -------------------------------------------------------------------

SMALL = Layout(("w", "b"), ((6, 5), (7,)))


@every_codec
@pytest.mark.parametrize("kind", ["strided", "reversed", "read-only", "float64", "list"])
def test_any_array_of_the_same_numbers_gives_the_same_bytes(codec, kind):
    x = laplace(SMALL.size)
    given = {
        "strided": np.repeat(x, 3)[::3],
        "reversed": x[::-1].copy()[::-1],
        "read-only": x.copy(),
        "float64": x.astype(np.float64),
        "list": x.tolist(),
    }[kind]
    if kind == "read-only":
        given.flags.writeable = False
    before = np.array(given)
    assert codec.encode(given, SMALL, seed=2) == codec.encode(x, SMALL, seed=2)
    assert np.array_equal(np.array(given), before)


@every_codec
@pytest.mark.parametrize("bad", [np.ones(37, complex), ["a"] * 37, [None] * 37, [[1.0], [2, 3]]])
def test_what_is_no_vector_of_numbers_is_refused(codec, bad):
    with pytest.raises(ConfigError, match=r"real numbers|shape|NaN"):
        codec.encode(bad, SMALL)


@every_codec
@pytest.mark.parametrize("value", [1e-45, -1e-40, 1.2e-38, 0.3, -3.4e38])
def test_equal_values_stay_finite_and_of_their_size(codec, value):
    x = np.full(SMALL.size, value, np.float32)
    y = codec.decode(codec.encode(x, SMALL, seed=1), SMALL)
    assert np.isfinite(y).all()
