"""What holds for codecs that rotate: the transform, their levels, error, bias and sizes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedq import DecodeError, Layout, build, codecs, wire
from fedq.codecs import _levels
from fedq.codecs._hadamard import LARGEST, SMALLEST, Rotation, piece_sizes, transform
from fedq.codecs.eden import levels
from fedq.codecs.quic_fl import _staircase
from fedq.errors import ConfigError
from tests import rotation_tables


def gaussian(d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(d).astype(np.float32)


def nmse(x: np.ndarray, y: np.ndarray) -> float:
    error = y.astype(np.float64) - x
    return float(error @ error / (x.astype(np.float64) @ x))


def decoded(codec, x: np.ndarray, seed: int) -> np.ndarray:
    layout = Layout.flat(x.size)
    return codec._decode(memoryview(codec._encode(x, layout, seed)), layout, seed)


# --- the rotation -------------------------------------------------------------------------------


def textbook(x: np.ndarray) -> np.ndarray:
    """Stages of radix 2 in float32, as a graphics card would do them."""
    h = 1
    while h < x.size:
        a, b = x.reshape(-1, 2, h).transpose(1, 0, 2)
        x, h = np.stack([a + b, a - b], axis=1).reshape(-1), 2 * h
    return x


@pytest.mark.parametrize("power", range(17))
def test_transform_has_the_bits_of_the_textbook(power):
    x = gaussian(1 << power)
    z = x.copy()
    transform(z)
    assert np.array_equal(z, textbook(x))


def test_transform_is_the_hadamard_matrix():
    matrix = np.ones((1, 1), np.float32)
    for _ in range(5):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    for i, row in enumerate(matrix):
        z = np.eye(32, dtype=np.float32)[i].copy()
        transform(z)
        assert np.array_equal(z, row)


@given(st.integers(0, 3 * LARGEST))
def test_pieces_hold_the_vector_and_little_more(count):
    sizes = piece_sizes(count)
    assert all(size & (size - 1) == 0 and size <= LARGEST for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert 0 <= sum(sizes) - count < SMALLEST / 2
    assert len(sizes) <= count / LARGEST + 11


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 98, 5000, 70_000])
@pytest.mark.parametrize("size", [1.0, 1e38, 1e-38])
def test_rotation_keeps_lengths_and_turns_back(rounds, count, size):
    x = (np.clip(gaussian(count), -3, 3) * np.float32(size)).astype(np.float32)
    rotation = Rotation(count, rounds, seed=4)
    z, units = rotation.forward(x)
    scales = [unit / rotation.gain(n) for unit, n in zip(units, rotation.sizes, strict=True)]
    for (start, stop), scale in zip(rotation.pieces(), scales, strict=True):
        before = np.linalg.norm(x[start:stop].astype(np.float64))
        after = np.linalg.norm(z[start:stop].astype(np.float64)) * scale
        assert after == pytest.approx(before, rel=1e-6)
    y = rotation.backward(z, scales)
    tolerance = np.float32(size) * 3e-6 + np.spacing(np.abs(x).max(initial=0))
    assert np.abs(y.astype(np.float64) - x).max(initial=0) <= tolerance


# --- the tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_are_what_the_generator_gives(bits):
    exact = rotation_tables.lloyd_max(bits) * _levels.UNIT
    assert np.abs(levels(bits) - exact).max() <= 0.51
    if bits == 2:  # Max 1960, table 1
        assert levels(2) / _levels.UNIT == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3)


@pytest.mark.parametrize(("bits", "error"), [(1, 1.465), (2, 0.2135), (3, 0.0426), (4, 0.0095)])
def test_quic_fl_levels_are_optimal(bits, error):
    stairs = _staircase(bits)
    table = stairs.levels.T.astype(np.float64)
    assert stairs.means[-1] == pytest.approx(rotation_tables.THRESHOLD, abs=1e-4)
    assert (np.diff(stairs.means) > 0).all()
    assert np.array_equal(table, -table[::-1, ::-1])
    found = rotation_tables.quic_fl_error(table)
    assert found == pytest.approx(error, rel=0.01)
    again = rotation_tables.quic_fl(bits, _levels.SHARED_BITS[bits - 1], iterations=40)
    assert found <= rotation_tables.quic_fl_error(again) * 1.0001


# --- error and size -----------------------------------------------------------------------------

#: Vargaftik et al. 2022, table 1: D / (1 - D) of Lloyd-Max; Ben Basat et al. 2024, at + 1/8 bit.
GAUSSIAN = [
    ("drive", {}, 0.571, 1),
    ("eden", {"bits": 1.0}, 0.571, 1),
    ("eden", {"bits": 2.0}, 0.133, 2),
    ("eden", {"bits": 3.0}, 0.0358, 3),
    ("eden", {"bits": 4.0}, 0.0096, 4),
    ("eden", {"bits": 0.5}, 1.571 / 0.5 - 1, 0.5),
    ("eden", {"bits": 0.1}, 1.571 / 0.1 - 1, 0.1),
    ("quic_fl", {"bits": 1}, 1.465, 1.1),
    ("quic_fl", {"bits": 2}, 0.2135, 2.1),
    ("quic_fl", {"bits": 3}, 0.0426, 3.1),
    ("quic_fl", {"bits": 4}, 0.0095, 4.1),
]


@pytest.mark.parametrize(("name", "options", "error", "bits"), GAUSSIAN)
@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_error_and_bits_are_those_of_the_paper(name, options, error, bits, kind):
    x = gaussian(100_000)
    if kind == "sparse" and bits >= 1:
        x[np.arange(x.size) % 40 > 0] = 0
    codec, layout = build("codec", name, **options), Layout.flat(x.size)
    payload = codec.encode(x, layout, seed=1)
    assert nmse(x, codec.decode(payload, layout)) == pytest.approx(error, rel=0.05)
    assert 8 * len(payload) / x.size <= 1.01 * bits + 0.01


def test_rates_between_integers_lie_between():
    x = gaussian(30_000)
    errors = [
        nmse(x, decoded(build("codec", "eden", bits=bits), x, 3))
        for bits in (0.7, 1.0, 1.25, 1.5, 2.0, 2.75, 3.0, 7.5, 8.0)
    ]
    assert all(b < a for a, b in pairwise(errors))


@pytest.mark.parametrize("bits", [1.0, 2.5, 8.0])
def test_eden_keeps_the_part_along_x(bits):
    x = gaussian(3000)
    y = decoded(build("codec", "eden", bits=bits), x, 1).astype(np.float64)
    assert y @ x == pytest.approx(x.astype(np.float64) @ x, rel=1e-5)


def test_drive_is_signs_and_its_scale():
    x = gaussian(256)
    rotation = Rotation(256, 2, seed=9)
    z, units = rotation.forward(x)
    scale = (z.astype(np.float64) ** 2).sum() / np.abs(z).sum(dtype=np.float64) * units[0] / 256
    expected = rotation.backward(np.where(z > 0, 1, -1).astype(np.float32), [scale])
    assert decoded(build("codec", "drive"), x, 9) == pytest.approx(expected, rel=1e-5, abs=1e-6)


# --- bias ---------------------------------------------------------------------------------------


def structured(kind: str) -> np.ndarray:
    x = np.zeros(4096, np.float32)
    if kind == "2-sparse":
        x[[5, 77]] = 1, 0.5
    elif kind == "embedding":
        x.reshape(64, 64)[[3, 20, 21, 50]] = gaussian(256).reshape(4, 64)
    elif kind == "constant":
        x[:] = 0.1
    else:
        x = gaussian(4096)
    return x


def averaging(codec, x: np.ndarray, draws: int) -> float:
    """Return draws * NMSE(mean of draws) / NMSE(1): 1 where errors cancel, draws where none do."""
    y = np.stack([decoded(codec, x, seed) for seed in range(draws)])
    single = np.mean([nmse(x, one) for one in y])
    return draws * nmse(x, y.mean(axis=0, dtype=np.float64)) / float(single)


@pytest.mark.parametrize("kind", ["gaussian", "2-sparse", "embedding", "constant"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("eden", {}), ("eden", {"bits": 3.0}), ("quic_fl", {"bits": 1}), ("quic_fl", {"bits": 3})],
)
def test_errors_of_two_rounds_average_out(name, options, kind):
    # Over 4096 coordinates the ratio of independent errors is within 0.15 of 1 (6 sigma).
    assert averaging(build("codec", name, **options), structured(kind), 100) < 1.15


def test_one_round_is_not_enough_for_eden():
    x = structured("2-sparse")
    assert averaging(build("codec", "eden", rounds=1), x, 50) > 40
    assert averaging(build("codec", "quic_fl", rounds=1), x, 100) < 1.15


def test_eden_is_not_exactly_unbiased():
    """Four spikes in 160 coordinates: the promise ``unbiased`` would be false."""
    x = np.where(np.arange(160) % 40, 1e-3, 1).astype(np.float32)
    codec = build("codec", "eden")
    assert not codec.unbiased
    assert averaging(codec, x, 600) > 4


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_quic_fl_codes_have_the_right_mean(bits):
    """Exactly, from the staircase: the mean over h of the mixed levels is any z."""
    stairs = _staircase(bits)
    level = np.take_along_axis(stairs.levels, stairs.states.astype(np.int64), 0).astype(np.float64)
    assert np.array_equal(level.mean(axis=1), stairs.means)
    z = np.linspace(-3.09, 3.09, 999)
    low = np.searchsorted(stairs.means, z, side="right") - 1
    share = (z - stairs.means[low]) / (stairs.means[low + 1] - stairs.means[low])
    mixed = (1 - share[:, None]) * level[low] + share[:, None] * level[low + 1]
    assert mixed.mean(axis=1) == pytest.approx(z, abs=1e-12)


# --- hostile bodies -----------------------------------------------------------------------------


def sealed(codec, layout: Layout, body: bytes) -> bytes:
    return wire.seal_frame(codec, layout, 0, body)


ONE = np.float32(1).tobytes()
FAR = np.float32(4).tobytes()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("eden", np.float32(-1).tobytes() + bytes(8)),
        ("eden", np.float32(np.inf).tobytes() + bytes(8)),
        ("eden", bytes(4) + b"\1" + bytes(7)),  # a code where the scale is zero
        ("eden", ONE + bytes(7)),
        ("quic_fl", bytes(4) + b"\1\0" + bytes(2) + FAR + bytes(16)),  # an outlier of zeros
        ("quic_fl", ONE + b"\7\0" + bytes(7 * 2)),  # more than 64 / 3.1**2
        ("quic_fl", ONE + b"\1\0\x40\0" + FAR + bytes(16)),  # beyond the piece
        ("quic_fl", ONE + b"\2\0\1\0\1\0" + FAR * 2 + bytes(16)),  # twice
        ("quic_fl", ONE + b"\1\0\1\0" + ONE + bytes(16)),  # not an outlier
        ("quic_fl", ONE + b"\1\0\1\0" + np.float32(9).tobytes() + bytes(16)),  # longer than all
        ("quic_fl", ONE + b"\1\0\1\0" + np.float32(np.nan).tobytes() + bytes(16)),
        ("quic_fl", bytes(4) + b"\0\0\1" + bytes(15)),
        ("quic_fl", ONE + b"\1"),
    ],
)
def test_hand_made_bodies_are_refused(name, body):
    layout, codec = Layout.flat(64), build("codec", name)
    good = {"eden": ONE + bytes(8), "quic_fl": ONE + b"\1\0\1\0" + FAR + bytes(16)}
    assert np.isfinite(codecs.decode(sealed(codec, layout, good[name]), layout)).all()
    assert len(body) <= codec.max_body_bytes(layout)
    with pytest.raises(DecodeError):
        codecs.decode(sealed(codec, layout, body), layout)


@pytest.mark.parametrize("name", ["drive", "eden", "quic_fl"])
def test_rounds_are_one_or_two(name):
    with pytest.raises(ConfigError, match=r"codec\.rounds"):
        build("codec", name, rounds=3)


@pytest.mark.parametrize("bits", [0.0, -1.0, 8.5])
def test_eden_says_which_rates_it_has(bits):
    with pytest.raises(ConfigError, match=r"codec\.bits"):
        build("codec", "eden", bits=bits)
