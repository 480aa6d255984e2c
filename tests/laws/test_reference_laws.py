"""What the papers promise of their codecs: levels, variances, lengths, and what decoders refuse."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedq import DecodeError, Layout, build, codecs, wire
from fedq.codecs import _elias, _golomb
from fedq.codecs._bits import pack
from fedq.codecs._product import accumulate
from fedq.codecs.blockwise import table
from fedq.errors import ConfigError
from fedq.feedback import compensate
from fedq.registry import from_config

LARGEST = float(np.finfo(np.float32).max)


def laplace(d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).laplace(size=d).astype(np.float32)


def decoded(codec, x: np.ndarray, seed: int = 0, layout: Layout | None = None) -> np.ndarray:
    layout = layout or Layout.flat(x.size)
    return codec.decode(codec.encode(x, layout, seed), layout)


def variance(codec, x: np.ndarray, draws: int = 60) -> float:
    """Return the mean squared error over seeds, relative to ``|x|**2``."""
    errors = [decoded(codec, x, seed).astype(np.float64) - x for seed in range(draws)]
    return float(np.mean(np.square(errors)) / np.mean(np.square(x, dtype=np.float64)))


def length(codec, x: np.ndarray) -> int:
    """Return the bytes of a body."""
    layout = Layout.flat(x.size)
    return len(wire.open_frame(codec.encode(x, layout, 1), layout).body)


# --- QSGD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 4, 16, 127])
def test_qsgd_variance_is_within_its_bound(levels):
    d = 256
    codec = build("codec", "qsgd", levels=levels, scale="model")
    bound = min(d / levels**2, math.sqrt(d) / levels)
    for x in (laplace(d), np.ones(d, np.float32), np.eye(1, d, dtype=np.float32)[0]):
        assert variance(codec, x) <= 1.1 * bound


def test_qsgd_variance_between_levels():
    codec, x = build("codec", "qsgd", levels=4, scale="model"), np.ones(256, np.float32)
    # |x| / norm is 1 / 16, a quarter of a level: variance 3 / 16 levels each.
    assert variance(codec, x) == pytest.approx(3 / 16 * 256 / 4**2, rel=0.1)


def test_qsgd_is_sparse_and_cheap_with_one_level():
    d = 4096
    x = laplace(d)
    codec = build("codec", "qsgd", levels=1, scale="model", coding="elias")
    counts = [np.count_nonzero(decoded(codec, x, seed)) for seed in range(20)]
    assert np.mean(counts) <= 1 + math.sqrt(d)
    assert length(codec, x) <= 4 + 2 * math.sqrt(d) * math.log2(d) / 8


def test_qsgd_takes_the_papers_bits_where_levels_are_dense():
    d = 4096  # corollary of theorem 3.2: 2.8 d + 32 bits for s = sqrt(d), small terms aside
    codec = build("codec", "qsgd", levels=64, scale="model", coding="elias")
    for x in (laplace(d), np.random.default_rng(0).standard_normal(d).astype(np.float32)):
        assert 8 * length(codec, x) <= 2.8 * d + 32


def test_qsgd_never_exceeds_its_levels():
    for x in (np.array([3e38, -3e38, 3e38]), np.array([0.1, 1e-45, 0]), np.array([1 / 3, 0, 0])):
        x = x.astype(np.float32)
        for levels in (1, 3, 32767):
            codec = build("codec", "qsgd", levels=levels, coding="elias")
            for seed in range(8):
                y = decoded(codec, x, seed)
                norm = min(float(np.linalg.norm(x.astype(np.float64))), LARGEST)
                assert float(np.abs(y).max()) <= norm * (1 + 1e-6)


def omega(value: int) -> str:
    """Return the textbook omega code."""
    code = "0"
    while value > 1:
        code = f"{value:b}{code}"
        value = value.bit_length() - 1
    return code


@given(st.lists(st.integers(-300, 300) | st.just(0), max_size=60))
def test_elias_codes_are_the_papers(numbers):
    levels = np.array(numbers, np.int32).reshape(-1)
    sign = {-1: "1", 0: "", 1: "0"}
    dense = "1" + "".join(omega(abs(v) + 1) + sign[np.sign(v)] for v in numbers)
    sparse, last = "0", -1
    for place, v in enumerate(numbers):
        if v:
            sparse += omega(place - last) + sign[np.sign(v)] + omega(abs(v))
            last = place
    sparse += omega(len(numbers) - last)
    bits = dense if len(dense) <= len(sparse) else sparse
    body = _elias.encode(levels)
    assert body == bytes(int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))
    assert np.array_equal(_elias.decode(memoryview(body), levels.size, 300), levels)
    assert len(body) <= _elias.max_bytes(levels.size, 300)
    if levels.any():
        with pytest.raises(DecodeError):
            _elias.decode(memoryview(body), levels.size, int(np.abs(levels).max()) - 1)


@given(st.binary(max_size=12), st.integers(0, 40))
def test_elias_decodes_only_what_it_writes(body, count):
    try:
        levels = _elias.decode(memoryview(body), count, 1000)
    except DecodeError:
        return
    assert _elias.encode(levels) == body


# --- block-wise tables ---------------------------------------------------------------------------


def test_nf4_levels_are_normal_quantiles():
    """As bitsandbytes' ``create_normal_map`` computes the table of QLoRA."""
    inverse, offset = NormalDist().inv_cdf, 0.9677083
    above = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*below, 0.0, *above])) / max(above)
    assert np.allclose(table("nf4"), levels, rtol=0, atol=3e-7)
    assert table("nf4").size == 16


def test_dynamic8_levels_are_the_dynamic_map():
    """As bitsandbytes' ``create_dynamic_map`` computes it, in float32."""
    levels = [0.0, 1.0]
    for i in range(7):
        bounds = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        means = (bounds[:-1] + bounds[1:]) / 2
        levels += [*(10.0 ** (i - 6) * means), *(-(10.0 ** (i - 6)) * means)]
    assert np.allclose(table("dynamic8"), sorted(levels), rtol=3e-7, atol=0)
    assert table("dynamic8").size == 256
    assert table("dynamic8")[[0, 127, 255]].tolist() == pytest.approx([-0.99296875, 0, 1])


@pytest.mark.parametrize("code", ["nf4", "fp4", "dynamic8"])
def test_blockwise_takes_the_nearest_level(code):
    x = np.append(np.float32(1), np.random.default_rng(0).uniform(-1, 1, 999)).astype(np.float32)
    y = decoded(build("codec", "blockwise", code=code, block=1000), x)
    distance = np.abs(x[:, None].astype(np.float64) - table(code)).min(axis=1)
    assert np.array_equal(np.abs(x.astype(np.float64) - y), distance)


@pytest.mark.parametrize("code", ["nf4", "fp4", "dynamic8"])
def test_blockwise_levels_are_exact_and_ties_go_down(code):
    levels = table(code)
    codec = build("codec", "blockwise", code=code, block=1024)
    assert np.array_equal(decoded(codec, levels), levels)
    middle = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    tie = middle.astype(np.float32) == middle  # float32 has room for the last bit
    assert tie.any()
    y = decoded(codec, np.append(middle[tie], 1))
    assert np.array_equal(y[:-1], levels[:-1][tie])


def test_double_quantization_costs_a_little_and_saves_three_bytes_a_block():
    x = laplace(64 * 256)
    once, twice = (
        build("codec", "blockwise", double=double, entropy="packed") for double in (False, True)
    )
    assert length(once, x) - length(twice, x) == 3 * 256 - 8
    assert variance(twice, x, 1) <= 1.1 * variance(once, x, 1)


# --- sparse codecs -------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
def test_random_k_variance(fraction):
    x = laplace(400)
    codec = build("codec", "random_k", fraction=fraction)
    y = decoded(codec, x, 1)
    kept = y != 0
    assert kept.sum() == 400 * fraction
    assert np.allclose(y[kept], x[kept] / fraction, rtol=1e-6)
    assert variance(codec, x, 300) == pytest.approx(1 / fraction - 1, rel=0.15, abs=1e-9)
    assert length(codec, x) == 4 * 400 * fraction


def test_random_k_draws_every_coordinate_alike():
    codec, x = build("codec", "random_k", fraction=0.25), np.ones(40, np.float32)
    counts = sum((decoded(codec, x, seed) > 0).astype(int) for seed in range(2000))
    assert np.abs(counts - 500).max() < 6 * math.sqrt(2000 * 0.25 * 0.75)


def test_random_k_within_random_k_draws_anew():
    codec = build("codec", "random_k", fraction=0.5, inner={"name": "random_k", "fraction": 0.5})
    x = np.ones(64, np.float32)
    mean = np.mean([decoded(codec, x, seed) for seed in range(600)], axis=0)
    assert np.abs(mean - 1).max() < 6 * math.sqrt(3 / 600)


@given(st.data())
def test_positions_round_trip(data):
    count = data.draw(st.integers(1, 200))
    places = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    positions = np.array(places, np.int64)
    body = _golomb.encode(positions, count)
    assert len(body) <= _golomb.max_bytes(positions.size, count)
    assert np.array_equal(_golomb.decode(memoryview(body), positions.size, count), positions)
    for wrong in (body + b"\0", body[:-1]):
        with pytest.raises(DecodeError):
            _golomb.decode(memoryview(wrong), positions.size, count)


@given(st.binary(max_size=10), st.integers(1, 60), st.data())
def test_positions_decode_only_what_is_written(body, count, data):
    kept = data.draw(st.integers(1, count))
    try:
        positions = _golomb.decode(memoryview(body), kept, count)
    except DecodeError:
        return
    assert (np.diff(positions, prepend=-1) > 0).all()
    assert positions[-1] < count
    assert _golomb.encode(positions, count) == body


@pytest.mark.parametrize("kept", [1, 2, 10, 100, 300, 381, 382, 383, 500, 999, 1000])
def test_golomb_parameter_is_the_papers(kept):
    p, phi = kept / 1000, (math.sqrt(5) + 1) / 2
    best = 0
    if p < 1:
        best = max(0, 1 + math.floor(math.log2(math.log(phi - 1) / math.log(1 - p))))
    assert _golomb.parameter(kept, 1000) == best


def test_stc_sends_one_magnitude_for_about_the_papers_bits():
    d, p = 40_000, 0.01
    x = laplace(d)
    codec = build("codec", "stc", fraction=p)
    y = decoded(codec, x)
    largest = np.argsort(-np.abs(x), kind="stable")[: int(d * p)]
    mu = np.abs(x[largest]).mean(dtype=np.float64)
    assert np.array_equal(np.flatnonzero(y), np.sort(largest))
    assert np.allclose(y[largest], mu * np.sign(x[largest]), rtol=1e-6)
    b = _golomb.parameter(int(d * p), d)
    position_bits = b + 1 / (1 - (1 - p) ** (2**b))
    assert length(codec, x) == pytest.approx(d * p * (position_bits + 1) / 8, rel=0.03)
    assert np.array_equal(decoded(build("codec", "stc", fraction=p, coding="range"), x), y)


@pytest.mark.parametrize("inner", ["stc", "power_sgd"])
def test_error_feedback_sends_the_rest_later(inner):
    layout = Layout.of({"w": np.empty((12, 20)), "b": np.empty(12)})
    codec = build("codec", "error_feedback", inner=inner)
    residual, sent, x = None, np.zeros(layout.size), laplace(layout.size)
    first = x - decoded(codec, x, 0, layout)
    for step in range(40):
        payload, residual = compensate(codec, x, residual, layout, seed=step)
        sent += codec.decode(payload, layout)
    assert np.linalg.norm(sent / 40 - x) < 0.6 * np.linalg.norm(first)


# --- natural compression, TernGrad ---------------------------------------------------------------


def test_natural_variance_is_an_eighth_at_most():
    codec = build("codec", "natural")
    x = np.full(3000, 4 / 3, np.float32)  # the worst place between two powers
    assert variance(codec, x, 20) == pytest.approx(1 / 8, rel=0.03)
    for x in (laplace(500), np.ldexp(laplace(500), -140), np.ldexp(laplace(500), 120)):
        assert variance(codec, x.astype(np.float32)) <= 0.13
    powers = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
    assert np.array_equal(decoded(codec, powers), powers)


@pytest.mark.parametrize("kind", [1.0, 1e-39, 1e-45, 3e38])
def test_natural_levels_are_powers_of_two(kind):
    x = (laplace(400) / 8 * np.float64(kind)).clip(-LARGEST, LARGEST).astype(np.float32)
    y = np.abs(decoded(build("codec", "natural"), x, 3).astype(np.float64))
    fraction, _ = np.frexp(y[(y > 0) & (y < LARGEST)])
    assert (fraction == 0.5).all()
    near = y[(x != 0) & (y < LARGEST)] / np.abs(x.astype(np.float64))[(x != 0) & (y < LARGEST)]
    assert near.min(initial=1) > 0.5
    assert near.max(initial=1) < 2


def test_ternary_variance_is_terngrads():
    x = laplace(500)
    s = np.abs(x).max()
    expected = float(np.sum(np.abs(x) * (s - np.abs(x))) / np.sum(x**2))
    assert variance(build("codec", "ternary"), x, 200) == pytest.approx(expected, rel=0.05)


# --- correlated quantization ---------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 4])
@pytest.mark.parametrize("n", [8, 32])
def test_correlated_errors_cancel_in_the_mean(levels, n):
    d = 400
    x = np.random.default_rng(0).uniform(-1, 1, d).astype(np.float32)
    layout = Layout.flat(d)
    codec = build("codec", "correlated", clients=n, levels=levels)
    alone, together = [], []
    for shared in range(6):
        y = np.stack([decoded(codec, x, n * shared + rank, layout) for rank in range(n)])
        alone.append(np.mean((y - x) ** 2))
        together.append(np.mean((y.mean(axis=0) - x) ** 2))
    independent = np.mean(alone) / n
    assert np.mean(together) < 3 * independent / n
    # Thresholds of one round cover (0, 1) evenly.
    u = np.sort([codec._thresholds(d, n * 5 + rank) for rank in range(n)], axis=0)
    assert np.array_equal(np.floor(u * n), np.tile(np.arange(n)[:, None], d))


def test_correlated_clients_who_differ_lose_nothing():
    n, d = 10, 300
    codec = build("codec", "correlated", clients=n, levels=4)
    xs = [laplace(d, seed) for seed in range(n)]
    together, alone = [], []
    for shared in range(30):
        errors = [decoded(codec, x, n * shared + rank) - x for rank, x in enumerate(xs)]
        together.append(np.mean(np.mean(errors, axis=0) ** 2))
        alone.append(np.mean(np.square(errors)) / n)
    assert np.mean(together) < 1.05 * np.mean(alone)


# --- low rank ------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9), st.integers(0, 99))
def test_products_are_rounded_in_order(rows, inner, columns, seed):
    rng = np.random.default_rng(seed)
    p, q, out = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rows, inner), (inner, columns), (rows, columns))
    )
    expected = out.copy()
    for k in range(inner):
        expected += p[:, k : k + 1] * q[k]
    accumulate(p, q, out)
    assert np.array_equal(out, expected)


def test_power_sgd_finds_the_best_low_rank_matrix():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    v, _ = np.linalg.qr(rng.standard_normal((60, 40)))
    singular = np.concatenate([[10, 8, 6], np.full(37, 0.3)])
    x = ((u * singular) @ v.T).astype(np.float32).ravel()
    layout = Layout(("w",), ((40, 60),))
    best = float(np.sum(singular[3:] ** 2))
    error = np.sum((decoded(build("codec", "power_sgd", rank=3), x, 1, layout) - x) ** 2)
    assert best * 0.999 <= error <= best * 1.1
    for rank in (1, 2):
        low = decoded(build("codec", "power_sgd", rank=rank), x, 1, layout).reshape(40, 60)
        assert np.linalg.matrix_rank(low, tol=1e-4) == rank


def test_power_sgd_is_exact_for_low_ranks_and_sends_vectors_as_they_are():
    layout = Layout.of({"w": np.empty((9, 4, 3, 3)), "b": np.empty(9), "small": np.empty((2, 3))})
    rng = np.random.default_rng(0)
    low = (rng.standard_normal((9, 2)) @ rng.standard_normal((2, 36))).ravel()
    for scale in (1.0, 1e-42, 3e37):
        x = (np.concatenate([low, laplace(15)]) * scale).astype(np.float32)
        y = decoded(build("codec", "power_sgd", rank=3), x, 0, layout)
        assert np.array_equal(y[324:], x[324:])
        assert np.allclose(y / scale, x / scale, atol=2e-6 if scale > 1e-40 else 1e-2)


# --- what no encoder writes, and wrong options ---------------------------------------------------

F32 = {value: np.float32(value).tobytes() for value in (0, 1, -1, np.nan, np.inf)}
PACKED_QSGD = {"name": "qsgd", "levels": 1, "scale": "model"}


@pytest.mark.parametrize(
    ("config", "body"),
    [
        (PACKED_QSGD, F32[1] + pack(np.array([3, 1, 1, 1]), 2)),  # level 2 of 1
        (PACKED_QSGD, F32[0] + pack(np.array([2, 1, 1, 1]), 2)),  # a level without a norm
        (PACKED_QSGD, F32[-1] + pack(np.array([1, 1, 1, 1]), 2)),
        ({**PACKED_QSGD, "coding": "elias"}, F32[1] + b"\xff\xff"),
        ({**PACKED_QSGD, "coding": "elias"}, F32[1] + b""),
        ({**PACKED_QSGD, "coding": "elias"}, F32[0] + _elias.encode(np.array([1, 0, 0, 0], "i4"))),
        ({**PACKED_QSGD, "coding": "elias"}, F32[1] + b"\x80\0"),  # too long
        ({**PACKED_QSGD, "coding": "elias"}, F32[1] + b"\x81"),  # padding
        ({"name": "blockwise", "entropy": "packed"}, F32[0] + b"\xff\xff"),
        ({"name": "blockwise", "entropy": "packed"}, F32[-1] + b"\x77\x77"),
        ({"name": "blockwise", "entropy": "packed", "code": "fp4"}, F32[1] + b"\xff\xff"),
        ({"name": "blockwise", "double": True}, F32[-1] + F32[0] + b"\x7f\x77\x77"),
        ({"name": "random_k", "fraction": 0.5}, bytes(4)),
        ({"name": "stc", "fraction": 0.5}, F32[0] + b"\0\0"),
        ({"name": "stc", "fraction": 0.5}, F32[1] + b"\4\0"),  # padding of the signs
        ({"name": "stc", "fraction": 0.5}, F32[1] + b"\0\xff"),  # beyond the end
        ({"name": "stc", "fraction": 0.5}, F32[1] + b"\0\1"),  # padding of positions
        ({"name": "stc", "fraction": 0.5}, F32[np.inf] + b"\0\0"),
        ({"name": "stc", "fraction": 0.5, "coding": "range"}, F32[1] + b"\x55"),
        ({"name": "stc", "fraction": 0.5, "coding": "range"}, F32[1] + b"\xff"),
        ({"name": "natural"}, b"\0"),
        ({"name": "natural"}, b"\x17\1" + pack(np.array([256, 255, 255, 255]), 9)),  # 2**129
        ({"name": "natural"}, b"\x96\0" + pack(np.array([258, 255, 255, 255]), 9)),  # not largest
        ({"name": "natural"}, b"\x96\0" + pack(np.array([511, 257, 255, 255]), 9)),
        ({"name": "natural"}, b"\x96\0" + pack(np.array([255, 255, 255, 255]), 9)),  # zero
        ({"name": "natural"}, b"\0\0" + pack(np.array([256, 255, 255, 255]), 9)),
        ({"name": "natural"}, b"\1\0" + pack(np.array([256, 258, 255, 255]), 9)),  # below 2**-149
        ({"name": "correlated", "levels": 3}, F32[1] + b"\xff"),
        ({"name": "correlated", "levels": 2}, F32[0] + b"\0"),
        ({"name": "power_sgd"}, F32[np.nan] + bytes(12)),
        ({"name": "power_sgd"}, bytes(12)),
    ],
)
def test_bodies_that_no_encoder_writes(config, body):
    layout = Layout.flat(4)
    codec = from_config("codec", config)
    assert len(body) <= codec.max_body_bytes(layout)
    with pytest.raises(DecodeError):
        codecs.decode(wire.seal_frame(codec, layout, 0, body), layout)


@pytest.mark.parametrize(
    "factors",
    [
        [-1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [np.nan, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, np.inf, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ],
)
def test_factors_that_no_encoder_writes(factors):
    layout = Layout(("w",), ((5, 5),))
    codec = build("codec", "power_sgd")
    body = np.array(factors, "<f4").tobytes()
    with pytest.raises(DecodeError):
        codecs.decode(wire.seal_frame(codec, layout, 0, body), layout)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qsgd", {"levels": 0}),
        ("qsgd", {"levels": 1 << 15}),
        ("qsgd", {"bucket": 0}),
        ("blockwise", {"block": 0}),
        ("random_k", {"fraction": 0.0}),
        ("random_k", {"fraction": 1.1}),
        ("stc", {"fraction": -0.1}),
        ("correlated", {"clients": 0}),
        ("correlated", {"levels": 1}),
        ("correlated", {"bucket": 0}),
        ("power_sgd", {"rank": 0}),
        ("power_sgd", {"iterations": 0}),
    ],
)
def test_wrong_options_say_what_to_do(name, options):
    with pytest.raises(ConfigError, match=r"codec\."):
        build("codec", name, **options)
