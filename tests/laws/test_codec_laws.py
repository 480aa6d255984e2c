"""What holds for every registered codec, on each of its ``examples``."""

from __future__ import annotations

import json
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedq import DecodeError, Layout, build, codecs, wire
from fedq.codecs import Codec
from fedq.codecs._bits import pack, unpack
from fedq.codecs._groups import group_sizes, starts
from fedq.codecs._rate import RateCodec
from fedq.codecs.lattice import _steps
from fedq.codecs.subset import Subset
from fedq.errors import ConfigError
from fedq.feedback import compensate
from fedq.random import SEED_BITS, round_seed
from fedq.registry import fields, from_config, table, to_config

CASES = [
    pytest.param(build("codec", name, **example), id=f"{name}-{index}")
    for name, cls in table("codec").items()
    for index, example in enumerate(cls.examples)
]
every_codec = pytest.mark.parametrize("codec", CASES)

#: To them a reference is a context, not a prediction.
BY_CONTEXT = ("dtcq", "rdo_tcq")
#: Their errors are spread over all coordinates of a piece, whatever lies where.
ROTATING = ("drive", "eden", "quic_fl")

MIXED = Layout.of(
    {
        "conv.weight": np.empty((4, 3, 3, 3)),
        "conv.bias": np.empty(4),
        "temperature": np.empty(()),
        "head.weight": np.empty((5, 4)),
        "empty": np.empty((0, 7)),
        "head.bias": np.empty(5),
    }
)
LAYOUTS = [Layout.flat(0), Layout.flat(1), Layout.flat(2), Layout.flat(257), MIXED]
LARGEST = float(np.finfo(np.float32).max)


def normal(layout: Layout, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
    x *= np.float32(0.01)
    x.flags.writeable = False
    return x


def resealed(payload: bytes, change: Any) -> bytes:
    """Return the payload with ``change`` done to all that its checksum covers, resealed."""
    content = bytearray(payload[7:])
    change(content)
    return wire._seal(wire.FRAME_MAGIC, bytes(content))


def reframed(codec: Codec, layout: Layout, body: bytes, seed: int = 0) -> bytes:
    return wire.seal_frame(codec, layout, seed, body)


def check_hostile(payload: bytes, layout: Layout, reference: np.ndarray | None = None) -> None:
    """A hostile payload is refused, or decodes to a finite vector of the layout's size."""
    try:
        y = codecs.decode(payload, layout, reference=reference)
    except DecodeError:
        return
    assert y.shape == (layout.size,)
    assert y.dtype == np.float32
    assert np.isfinite(y).all()


# --- every codec is examined ------------------------------------------------------------------


@pytest.mark.parametrize("name", table("codec"))
def test_has_examples(name):
    assert len(table("codec")[name].examples) > 0


@every_codec
def test_config_round_trip(codec):
    config = json.loads(json.dumps(to_config(codec)))
    assert from_config("codec", config) == codec
    frame = wire.open_frame(reframed(codec, MIXED, b"", seed=2**64 - 1), MIXED)
    assert frame.codec == codec
    assert frame.seed == 2**64 - 1


# --- shape, size, purity ----------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"d{layout.size}")
def test_round_trip_shape_and_size(codec, layout):
    x = normal(layout)
    before = x.copy()
    payload = codec.encode(x, layout, seed=5)
    y = codec.decode(payload, layout)
    assert isinstance(payload, bytes)
    assert y.shape == (layout.size,)
    assert y.dtype == np.float32
    assert np.isfinite(y).all()
    assert np.array_equal(x, before)
    header = len(reframed(codec, layout, b"", seed=5))
    assert len(payload) <= header + codec.max_body_bytes(layout)
    assert np.array_equal(codecs.decode(payload, layout), y)


@every_codec
def test_same_seed_same_bytes(codec):
    x = normal(Layout.flat(300))
    layout = Layout.flat(300)
    first, again, other = (codec.encode(x, layout, seed) for seed in (1, 1, 2))
    assert first == again
    decoded, elsewhere = codec.decode(first, layout), codec.decode(other, layout)
    assert np.array_equal(decoded, elsewhere) != draws(codec)


@every_codec
def test_a_client_has_a_seed_of_its_own_in_each_round(codec):
    cohort = range(5)
    seeds = [[codec.client_seed(round_seed(0, r), client) for client in cohort] for r in (1, 2)]
    assert seeds == [[codec.client_seed(round_seed(0, r), c) for c in cohort] for r in (1, 2)]
    assert len({seed for row in seeds for seed in row}) == 10
    assert all(0 <= seed < 2**SEED_BITS for row in seeds for seed in row)
    assert 0 <= codec.client_seed(round_seed(0, 1), 2**64 - 1) < 2**SEED_BITS


def draws(codec: Codec) -> bool:
    """Whether the codec's output depends on its seed."""
    if codec.name == "random_k" and codec.fraction < 1:
        return True
    if isinstance(getattr(codec, "inner", None), Codec):
        return draws(codec.inner)
    if codec.name in ("ternary", *ROTATING):
        return True
    return codec.unbiased and codec.name != "identity"


@every_codec
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"d{layout.size}")
def test_zero_is_exact(codec, layout):
    zero = np.zeros(layout.size, np.float32)
    for x in (zero, -zero):
        y = codec.decode(codec.encode(x, layout, seed=3), layout)
        assert np.array_equal(y, zero)


@every_codec
@pytest.mark.parametrize("alive", [0, 1])
def test_layers_of_zeros_are_no_trouble(codec, alive):
    """Frozen or dead matrices, alone and beside one that learns."""
    layout = Layout.of({"a": np.empty((64, 48)), "b": np.empty((64, 48))})
    x = np.zeros(layout.size, np.float32)
    x[: 64 * 48] = alive * np.random.default_rng(5).standard_normal(64 * 48)
    y = codec.decode(codec.encode(x, layout, seed=3), layout)
    assert np.isfinite(y).all()
    assert alive or not y.any()


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_non_finite(codec, bad):
    x = np.zeros(8, np.float32)
    x[3] = bad
    with pytest.raises(ConfigError, match="NaN or infinity"):
        codec.encode(x, Layout.flat(8))


@every_codec
def test_refuses_wrong_shape(codec):
    with pytest.raises(ConfigError, match="shape"):
        codec.encode(np.zeros(7, np.float32), Layout.flat(8))


EXTREMES = {
    "huge": [LARGEST, -LARGEST, LARGEST, 1.0],
    "3e38": [3e38, 3e38, -3e38, 2e38],
    "smallest": [1e-45, -1e-45, 0.0, 3e-45],
    "subnormal": [1e-39, -2e-40, 1e-45, 5e-39],
    "mixed": [3e38, 1e-45, -1.0, 0.0],
    "equal": [-0.7, -0.7, -0.7, -0.7],
    "adjacent": [1.0, np.nextafter(np.float32(1), np.float32(2)), 1.0, 1.0],
}


@every_codec
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("repeat", [1, 40])
def test_extremes_stay_finite_and_in_range(codec, kind, repeat):
    x = np.tile(np.array(EXTREMES[kind], np.float32), repeat)
    layout = Layout.flat(x.size)
    y = codec.decode(codec.encode(x, layout, seed=9), layout)
    assert np.isfinite(y).all()
    if isinstance(codec, RateCodec | Subset):
        return  # at few bits, the error of what is unbiased may exceed the vector
    span = float(x.max()) - float(min(x.min(), 0))
    size = np.abs(y.astype(np.float64))
    if codec.name in ROTATING:  # no coordinate has a bound of its own, their energy has
        size = 0.999 * np.sqrt(np.mean(size**2)) * min(1.0, getattr(codec, "bits", 1.0))
    assert size.max() <= 2 * max(span, float(np.abs(x).max()))


@every_codec
@settings(max_examples=12)
@given(data=st.data())
def test_any_finite_vector_round_trips(codec, data):
    shapes = data.draw(
        st.lists(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), max_size=4)
    )
    layout = Layout(tuple(f"t{i}" for i in range(len(shapes))), tuple(shapes))
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x = data.draw(hnp.arrays(np.float32, layout.size, elements=values))
    seed = data.draw(st.integers(-(2**70), 2**70))
    y = codec.decode(codec.encode(x, layout, seed), layout)
    assert y.shape == x.shape
    assert np.isfinite(y).all()


# --- prediction from a reference ----------------------------------------------------------------

PREDICTIVE = [case for case in CASES if case.values[0].predictive]
predictive_codec = pytest.mark.parametrize("codec", PREDICTIVE)


def references(x: np.ndarray) -> dict[str, np.ndarray]:
    layout = Layout.flat(x.size)
    return {
        "close": x + np.float32(0.01) * normal(layout, seed=1),
        "far": normal(layout, seed=2),
        "zero": np.zeros_like(x),
        "huge": np.where(np.arange(x.size) % 3, LARGEST, -LARGEST).astype(np.float32),
    }


def test_some_codec_is_predictive():
    assert PREDICTIVE


@predictive_codec
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"d{layout.size}")
def test_a_reference_changes_the_length_alone(codec, layout):
    for x in (normal(layout), np.zeros(layout.size, np.float32), 1e38 * normal(layout)):
        expected = codec.decode(codec.encode(x, layout, seed=5), layout)
        for reference in references(x).values():
            before = reference.copy()
            reference.flags.writeable = False
            payload = codec.encode(x, layout, seed=5, reference=reference)
            assert np.array_equal(codec.decode(payload, layout, reference=reference), expected)
            assert np.array_equal(codecs.decode(payload, layout, reference=reference), expected)
            assert np.array_equal(reference, before)
            header = len(reframed(codec, layout, b"", seed=5))
            assert len(payload) <= header + codec.max_body_bytes(layout)


@predictive_codec
@settings(max_examples=12)
@given(data=st.data())
def test_any_reference_will_do(codec, data):
    layout = Layout(("w", "b"), ((3, 4), (3,)))
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x, reference = (data.draw(hnp.arrays(np.float32, 15, elements=values)) for _ in range(2))
    payload = codec.encode(x, layout, 1, reference=reference)
    y = codec.decode(payload, layout, reference=reference)
    assert np.array_equal(y, codec.decode(codec.encode(x, layout, 1), layout))


@predictive_codec
@pytest.mark.parametrize("layout", [MIXED, Layout.flat(3000)], ids=["mixed", "flat"])
def test_a_close_reference_shortens_the_payload(codec, layout):
    x = normal(layout)
    whole = len(codec.encode(x, layout))
    assert len(codec.encode(x, layout, reference=references(x)["close"])) <= whole + 4
    if codec.name in BY_CONTEXT:
        return
    exact = codec.decode(codec.encode(x, layout), layout)
    overhead = len(reframed(codec, layout, b"")) + 8 * layout.size / 9  # scales
    assert len(codec.encode(x, layout, reference=exact)) <= min(whole, overhead + whole / 4)


@pytest.mark.parametrize(
    "codec", [case for case in PREDICTIVE if case.values[0].name in BY_CONTEXT]
)
def test_a_context_pays_once_it_is_learned(codec):
    layout = Layout(("w",), ((100, 200),))
    noise, reference = normal(layout), normal(layout, seed=1)
    whole = len(codec.encode(noise, layout))
    assert len(codec.encode(noise, layout, reference=reference)) <= 1.01 * whole + 8
    large = np.abs(reference) > 0.01
    for x in (noise * (0.3 + large), np.abs(noise) * np.sign(reference)):  # magnitudes; signs
        whole = len(codec.encode(x, layout, seed=2))
        assert len(codec.encode(x, layout, seed=2, reference=reference)) < 0.97 * whole
        scaled = np.float32(1e-20) * reference  # its unit does not matter
        assert len(codec.encode(x, layout, seed=2, reference=scaled)) < 0.97 * whole


@predictive_codec
def test_only_its_own_reference_decodes(codec):
    x = normal(MIXED)
    ours = references(x)["close"]
    other = ours.copy()
    other[7] = np.nextafter(other[7], np.float32(1))
    payload, whole = codec.encode(x, MIXED, reference=ours), codec.encode(x, MIXED)
    for wrong in (None, other, -ours):
        with pytest.raises(DecodeError, match="differ"):
            codec.decode(payload, MIXED, reference=wrong)
        with pytest.raises(DecodeError, match="differ"):
            codecs.decode(payload, MIXED, reference=wrong)
    with pytest.raises(DecodeError, match="differ"):
        codec.decode(whole, MIXED, reference=ours)


@every_codec
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"d{layout.size}")
def test_what_settles_stays_near_and_costs_no_more(codec, layout):
    x, drift = normal(layout), np.float32(0.02) * normal(layout, seed=1)
    previous = codec.decode(codec.encode(x, layout, 1), layout)
    previous.flags.writeable = False
    settled = codec.settle(x + drift, previous, layout)
    assert settled.dtype == np.float32
    assert ((settled == x + drift) | (settled == previous)).all()
    assert np.array_equal(codec.settle(previous, previous, layout), previous)
    if codec.predictive:
        lengths = [
            len(codec.encode(y, layout, 1, reference=previous)) for y in (settled, x + drift)
        ]
        assert lengths[0] <= lengths[1] + 2


@pytest.mark.parametrize("scale", ["model", "tensor", "channel"])
def test_a_lattice_moves_only_beyond_its_dead_zone(scale):
    codec = build("codec", "lattice", step=0.5, margin=0.25, scale=scale)
    x = normal(MIXED)
    sent = codec.decode(codec.encode(x, MIXED), MIXED)
    sizes = group_sizes(MIXED, scale, 0)
    steps = _steps(codec._indices(sent, sizes), sizes)
    for moved, stays in ((0.7, True), (-0.7, True), (0.8, False), (-0.8, False)):
        y = sent.copy()
        y[5] += moved * steps[5]
        settled = codec.settle(y, sent, MIXED)
        assert (settled[5] == sent[5]) == stays
        assert np.array_equal(np.delete(settled, 5), np.delete(sent, 5))


def test_steps_are_a_fixed_series_next_to_what_is_wanted():
    codec = build("codec", "lattice", step=0.5)
    seen = set()
    for size in np.geomspace(1e-30, 1e30, 400):
        x = (size * np.where(np.arange(64) % 2, 1, -1)).astype(np.float32)
        (step,) = set(_steps(codec._indices(x, np.array([64])), np.array([64])))
        assert 1.5**-0.5 * (1 - 1e-6) <= step / (0.5 * size) <= 1.5**0.5 * (1 + 1e-6)
        mantissa, _ = np.frexp(step)
        seen.add(mantissa)
    assert seen == {0.5, 0.75}


@pytest.mark.parametrize("codec", [case for case in CASES if case not in PREDICTIVE])
def test_other_codecs_refuse_a_reference(codec):
    x = normal(MIXED)
    with pytest.raises(ConfigError, match="cannot use a reference"):
        codec.encode(x, MIXED, reference=x)
    body = bytes(wire.open_frame(codec.encode(x, MIXED), MIXED).body)
    with pytest.raises(DecodeError, match="cannot use a reference"):
        codecs.decode(wire.seal_frame(codec, MIXED, 0, body, x), MIXED, reference=x)


@predictive_codec
def test_references_are_checked_as_vectors_are(codec):
    x = normal(MIXED)
    payload = codec.encode(x, MIXED, reference=x)
    for bad, message in [
        (x[:-1], "shape"),
        (x[None], "shape"),
        (x.astype(np.float64), "float32"),
        (x.tolist(), "float32"),
        (np.where(x == x[5], np.float32(np.nan), x), "NaN"),
        (np.where(x == x[5], np.float32(np.inf), x), "NaN or infinity"),
    ]:
        with pytest.raises(ConfigError, match=message):
            codec.encode(x, MIXED, reference=bad)
        for decode in (codec.decode, codecs.decode):
            with pytest.raises(ConfigError, match=message):
                decode(payload, MIXED, reference=bad)
    spaced = np.repeat(x, 2)[::2]
    assert codec.encode(x, MIXED, reference=spaced) == payload
    assert np.array_equal(
        codec.decode(payload, MIXED, reference=spaced), codec.decode(payload, MIXED, reference=x)
    )


@predictive_codec
@pytest.mark.parametrize("kind", ["close", "far", "zero", "huge"])
def test_hostile_payloads_beside_a_reference(codec, kind):
    rng = np.random.default_rng(0)
    for layout in (MIXED, Layout.flat(120)):
        x = normal(layout)
        reference = references(x)[kind]
        payload = codec.encode(x, layout, seed=1, reference=reference)
        body = bytes(wire.open_frame(payload, layout, reference).body)
        for cut in range(0, len(body), 3):
            short = wire.seal_frame(codec, layout, 1, body[:cut], reference)
            check_hostile(short, layout, reference)
        for scale in (-1.0, np.nan, LARGEST, 1e-45, 0.0):
            scaled = np.float32(scale).tobytes() + body[4:]
            check_hostile(wire.seal_frame(codec, layout, 1, scaled, reference), layout, reference)
        for _ in range(40):

            def mutate(content):
                for _ in range(rng.integers(1, 4)):
                    content[rng.integers(len(content))] = rng.integers(256)

            check_hostile(resealed(payload, mutate), layout, reference)


# --- bias -------------------------------------------------------------------------------------


def _vectors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    d = 160
    sparse = np.zeros(d)
    sparse[[3, 90]] = 1.0, -0.4
    ramp = np.linspace(-1, 2, d)
    spike = np.full(d, 1e-3)
    spike[::40] = 1.0
    two = np.where(np.arange(d) % 2, 0.3, -0.1)
    vectors = {
        "dense": rng.standard_normal(d),
        "sparse": sparse,
        "ramp": ramp,
        "spike": spike,
        "two-valued": two,
        "huge": ramp * 1e38,
        "tiny": ramp * 1e-38,
    }
    return {name: x.astype(np.float32) for name, x in vectors.items()}


DRAWS = 250


@pytest.mark.parametrize("codec", [case for case in CASES if case.values[0].unbiased])
@pytest.mark.parametrize("kind", _vectors())
def test_unbiased(codec, kind):
    x = _vectors()[kind]
    layout = Layout(("a", "b"), ((10, 12), (40,)))
    y = np.stack(
        [codec._decode(memoryview(codec._encode(x, layout, s)), layout, s) for s in range(DRAWS)]
    ).astype(np.float64)
    error = y - x.astype(np.float64)
    # A coordinate that hardly ever moves shows no spread: allow what 32-bit rounding may do to it,
    # and the chance of a level that none of the draws has met.
    deviation = np.sqrt(error.var(axis=0, ddof=1) / DRAWS)
    rounding = np.spacing(np.abs(x)).astype(np.float64)
    still = (error != np.median(error, axis=0)).sum(axis=0) < 12
    unseen = float(max(np.abs(x).max(), np.abs(y).max())) * 12 / DRAWS * still
    assert (np.abs(error.mean(axis=0)) <= 6 * deviation + rounding + unseen).all()
    # All coordinates together: the mean error along x, whose spread is smaller by sqrt(d).
    along = error @ (x.astype(np.float64) / np.abs(x).max())
    slack = 160 * rounding.max()
    assert abs(along.mean()) <= 6 * along.std(ddof=1) / np.sqrt(DRAWS) + slack


def test_a_biased_codec_fails_the_law_of_bias():
    x = _vectors()["dense"]
    layout = Layout.flat(x.size)
    codec = build("codec", "sign")
    y = codec.decode(codec.encode(x, layout), layout)
    along = (y - x) @ (x / np.abs(x).max())
    assert not codec.unbiased
    assert abs(along) > 1


# --- error bounds -----------------------------------------------------------------------------


def _uniform_step(codec: Codec, x: np.ndarray, layout: Layout) -> np.ndarray:
    sizes = group_sizes(layout, codec.scale, codec.bucket)
    at = starts(sizes)
    low = np.minimum.reduceat(x, at).astype(np.float64)
    high = np.maximum.reduceat(x, at).astype(np.float64)
    largest = np.maximum(-low, high)
    if not codec.symmetric:
        step = (high - low) / (2**codec.bits - 1)
    else:
        step = largest / max(2 ** (codec.bits - 1) - 1, 0.5)
    return np.repeat(step, sizes)


@pytest.mark.parametrize("codec", [case for case in CASES if case.values[0].name == "uniform"])
@pytest.mark.parametrize("layout", [MIXED, Layout.flat(700)], ids=["mixed", "flat"])
def test_uniform_error_is_within_a_step(codec, layout):
    x = normal(layout, seed=4)
    y = codec.decode(codec.encode(x, layout, seed=4), layout)
    error = np.abs(y.astype(np.float64) - x)
    step = _uniform_step(codec, x, layout)
    slack = np.spacing(np.abs(x).max())
    if codec.symmetric and codec.bits == 1:
        # Two levels, +-mean or +-max.
        assert (error <= 2 * step + slack).all()
    else:
        bound = 1.0 if codec.rounding == "stochastic" else 0.5
        assert (error <= bound * step + slack).all()
        assert error.max() > 0.2 * bound * step.min()


def test_dither_error_is_uniform_and_independent_of_the_value():
    layout = Layout.flat(40_000)
    x = np.repeat(np.array([0.0, 0.31, 0.5, 1.0], np.float32), 10_000)
    codec = build("codec", "uniform", bits=3, rounding="dithered")
    error = (codec.decode(codec.encode(x, layout, seed=1), layout) - x) * 3  # in steps
    for part in np.split(error, 4):
        assert abs(part.var() - 1 / 12) < 0.004
        counts = np.histogram(part, bins=10, range=(-0.5, 0.5))[0]
        assert counts.sum() == part.size
        assert np.abs(counts / 1000 - 1).max() < 0.15


def test_casts_are_the_nearest_values():
    rng = np.random.default_rng(0)
    x = (rng.uniform(0.5, 1.5, 3000) * 10.0 ** rng.integers(-3, 4, 3000)).astype(np.float32)
    layout = Layout.flat(x.size)
    for name, bits in (("fp16", 11), ("bf16", 8)):
        codec = build("codec", name)
        y = codec.decode(codec.encode(x, layout), layout)
        error = np.abs(y - x) / np.abs(x)
        assert error.max() <= 2.0**-bits
        assert error.max() > 2.0 ** -(bits + 1)


def test_casts_saturate_and_round_ties_to_even():
    layout = Layout.flat(5)
    x = np.array([1e5, -1e5, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-24], np.float32)
    codec = build("codec", "fp16")
    y = codec.decode(codec.encode(x, layout), layout)
    assert y.tolist() == [65504, -65504, 1, 1 + 2.0**-9, 2.0**-24]
    x = np.array([LARGEST, -LARGEST, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-133], np.float32)
    codec = build("codec", "bf16")
    y = codec.decode(codec.encode(x, layout), layout)
    top = np.float32(255 / 128 * 2.0**127)
    assert y.tolist() == [top, -top, 1, 1 + 2.0**-6, 2.0**-133]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_log_levels_are_powers_of_two(bits, rounding):
    layout = Layout.flat(2000)
    x = normal(layout, seed=2)
    codec = build("codec", "log", bits=bits, rounding=rounding)
    y = codec.decode(codec.encode(x, layout, seed=2), layout)
    m = np.abs(x).max()
    levels = np.log2(np.abs(y[y != 0]) / m)
    assert np.array_equal(levels, np.rint(levels))
    lowest = 2 - 2 ** (bits - 1)
    assert levels.min() >= lowest
    assert ((y == 0) | (np.sign(y) == np.sign(x))).all()
    inside = np.abs(x) >= m * 2.0**lowest
    worst = (np.abs(y - x) / np.abs(x))[inside].max()
    assert worst <= (1 / 3 if rounding == "nearest" else 1) + 1e-6
    assert bits == 2 or worst > 0.3


def test_codebook_is_a_fixed_point_of_lloyd():
    layout = Layout.flat(5000)
    x = normal(layout, seed=3)
    codec = build("codec", "codebook", bits=3, iterations=1000)
    y = codec.decode(codec.encode(x, layout), layout)
    levels = np.unique(y)
    assert levels.size == 8
    distance = np.abs(x[:, None] - levels)
    assert np.allclose(np.abs(y - x), distance.min(axis=1), atol=1e-9)
    for level in levels:
        assert level == pytest.approx(x[y == level].mean(dtype=np.float64), rel=1e-4, abs=1e-7)
    # 8 levels of Lloyd and Max for a Gaussian: 0.03454 (Max 1960, table 1).
    assert np.mean((y - x) ** 2) / np.mean(x**2) == pytest.approx(0.03454, rel=0.05)


def test_codebook_is_exact_for_few_values():
    layout = Layout.flat(600)
    x = np.random.default_rng(0).choice(np.array([-3, 0, 0.1, 7], np.float32), 600)
    codec = build("codec", "codebook", bits=2)
    assert np.array_equal(codec.decode(codec.encode(x, layout), layout), x)


def test_constant_tensors_are_exact_when_asymmetric():
    x = np.concatenate([np.full(108, v, np.float32) for v in (0.3,)])
    x = np.concatenate([x, np.full(4, -7e-3), [1e30], np.full(20, 1e-45), np.zeros(5)]).astype("f4")
    for bits in (1, 4, 16):
        for rounding in ("nearest", "stochastic", "dithered"):
            codec = build("codec", "uniform", bits=bits, symmetric=False, rounding=rounding)
            assert np.array_equal(codec.decode(codec.encode(x, MIXED, seed=1), MIXED), x)


def test_zero_channels_are_exact():
    x = normal(MIXED).copy()
    x[:27] = 0
    codec = build("codec", "uniform", bits=3, rounding="dithered", scale="channel")
    y = codec.decode(codec.encode(x, MIXED, seed=1), MIXED)
    assert not y[:27].any()
    assert y[27:108].all()


def test_top_k_keeps_the_largest_and_breaks_ties_by_place():
    layout = Layout.flat(8)
    x = np.array([1, -2, 2, 0.5, 2, -2, 3, 2], np.float32)
    codec = build("codec", "top_k", fraction=0.5, inner="identity")
    y = codec.decode(codec.encode(x, layout), layout)
    assert y.tolist() == [0, -2, 2, 0, 2, 0, 3, 0]


def test_top_k_pays_little_for_positions():
    layout = Layout.flat(20_000)
    x = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)
    codec = build("codec", "top_k", fraction=0.01)
    entropy = 20_000 * 0.0808 / 8  # H(0.01) = 0.0808 bit
    assert len(codec.encode(x, layout)) < 1.05 * entropy + 2 * 200 + 40


def test_range_coding_beats_packing_and_never_exceeds_it():
    layout = Layout.of({"w": np.empty((50, 100))})
    rng = np.random.default_rng(0)
    for x, gain in ((rng.laplace(size=5000) ** 3, 0.6), (rng.uniform(-1, 1, 5000), 1.0)):
        sizes = [
            len(build("codec", "uniform", bits=4, entropy=entropy).encode(x, layout, 1))
            for entropy in ("max", "packed")
        ]
        assert sizes[0] <= gain * sizes[1] + 2


# --- error feedback ---------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["sign", "top_k", "codebook", "uniform"])
def test_error_feedback_loses_nothing_over_rounds(inner):
    layout = Layout.flat(300)
    codec = build("codec", "error_feedback", inner=inner)
    residual, sent, meant = None, np.zeros(300), np.zeros(300)
    for step in range(20):
        x = normal(layout, seed=step)
        payload, residual = compensate(codec, x, residual, layout, seed=step)
        sent += codec.decode(payload, layout)
        meant += x
    assert residual.dtype == np.float32
    assert np.allclose(sent + residual, meant, atol=1e-6)


def test_error_feedback_decays_and_is_pure():
    layout = Layout.flat(50)
    x, residual = normal(layout, 1), normal(layout, 2)
    codec = build("codec", "error_feedback", inner="sign", decay=0.5)
    payload, _ = compensate(codec, x, residual, layout, seed=0)
    assert payload == codec.encode(x + np.float32(0.5) * residual, layout, seed=0)
    assert np.array_equal(residual, normal(layout, 2))
    forgetful = build("codec", "error_feedback", inner="sign", decay=0.0)
    assert compensate(forgetful, x, residual, layout, 0)[0] == forgetful.encode(x, layout, 0)
    with pytest.raises(ConfigError, match="shape"):
        compensate(codec, x, residual[:-1], layout, seed=0)


# --- hostile payloads -------------------------------------------------------------------------


@cache
def _payloads(codec: Codec) -> tuple[tuple[Layout, bytes], ...]:
    flat = Layout.flat(120)
    return tuple((lay, codec.encode(normal(lay), lay, seed=1)) for lay in (MIXED, flat))


@every_codec
def test_truncations_and_extensions(codec):
    for layout, payload in _payloads(codec):
        for cut in range(len(payload)):
            with pytest.raises(DecodeError):
                codecs.decode(payload[:cut], layout)
        body = bytes(wire.open_frame(payload, layout).body)
        for cut in range(len(body)):
            check_hostile(reframed(codec, layout, body[:cut], seed=1), layout)
        for tail in (b"\0", b"\1", b"\xff" * 9, bytes(200)):
            if len(body + tail) == codec.max_body_bytes(layout):
                continue  # now it has the length of packed codes
            longer = reframed(codec, layout, body + tail, seed=1)
            if any(tail) and len(body) < codec.max_body_bytes(layout):
                # Entropy codes are dense: this may be the code of other integers.
                check_hostile(longer, layout)
            else:
                with pytest.raises(DecodeError):
                    codecs.decode(longer, layout)


@every_codec
def test_mutated_and_resealed_payloads(codec):
    rng = np.random.default_rng(0)
    for layout, payload in _payloads(codec):
        for _ in range(60):

            def mutate(content):
                for _ in range(rng.integers(1, 4)):
                    content[rng.integers(len(content))] = rng.integers(256)

            check_hostile(resealed(payload, mutate), layout)


SCALES = [np.nan, np.inf, -np.inf, -1.0, -0.0, 3e38, LARGEST, 1e-45, 0.0, 1.0]


@every_codec
@pytest.mark.parametrize("scale", SCALES)
def test_extreme_bodies(codec, scale):
    layout = Layout.flat(24)
    number, sizes = np.float32(scale).tobytes(), (0, 3, 6, 12, 24, 48)
    fills = [fill * size for fill in (b"\0", b"\xff", b"\x55") for size in sizes]
    patterns = [number * count + fill for count in (1, 2) for fill in fills]
    patterns += [number * (size // 4) for size in sizes]
    bodies = {head + pattern for head in (b"", b"\0", b"\1", b"\xff") for pattern in patterns}
    for body in {body[: codec.max_body_bytes(layout)] for body in bodies}:
        check_hostile(reframed(codec, layout, body), layout)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, -0.0])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("uniform", {"entropy": "packed"}),
        ("log", {"bits": 8, "entropy": "packed"}),
        ("ternary", {}),
        ("sign", {}),
    ],
)
def test_scales_that_no_encoder_writes_are_refused(name, options, scale):
    layout = Layout.flat(16)
    codec = build("codec", name, **options)
    body = bytes(wire.open_frame(codec.encode(np.ones(16, "f4"), layout), layout).body)
    body = np.float32(scale).tobytes() + body[4:]
    with pytest.raises(DecodeError, match="scale"):
        codecs.decode(reframed(codec, layout, body), layout)


@pytest.mark.parametrize(
    ("config", "body"),
    [
        # The unused top code of symmetric grids.
        ({"name": "uniform", "entropy": "packed"}, np.float32(1).tobytes() + b"\xff" * 4),
        ({"name": "log", "bits": 8, "entropy": "packed"}, np.float32(1).tobytes() + b"\xff" * 4),
        ({"name": "ternary"}, np.float32(1).tobytes() + b"\xff"),
        # A code that is not zero where the scale is.
        ({"name": "uniform", "entropy": "packed"}, np.float32(0).tobytes() + b"\x80" * 4),
        ({"name": "log", "bits": 8, "entropy": "packed"}, np.float32(0).tobytes() + b"\x80" * 4),
        ({"name": "sign"}, np.float32(0).tobytes() + b"\x01"),
        # Minimum above maximum.
        (
            {"name": "uniform", "symmetric": False, "entropy": "packed"},
            np.array([1, 0], np.float32).tobytes() + bytes(4),
        ),
        # Codebooks that descend, repeat, or are exceeded.
        ({"name": "codebook"}, b"\1" + np.array([1, 0], np.float32).tobytes() + bytes(2)),
        ({"name": "codebook"}, b"\1" + np.array([0, -0.0], np.float32).tobytes() + bytes(2)),
        ({"name": "codebook"}, b"\0" + np.float32(1).tobytes() + b"\xff" * 2),
        ({"name": "codebook", "bits": 1}, b"\2" + bytes(9)),
        # A mask of the wrong weight, a mask longer than the body.
        ({"name": "top_k", "fraction": 0.5}, b"\1\x07" + bytes(4)),
        ({"name": "top_k", "fraction": 0.5}, b"\xff\xff\x03" + bytes(3)),
        # Steps out of range, a step short, a level that no side has.
        ({"name": "lattice"}, np.array([257], "<i2").tobytes() + bytes(8)),
        ({"name": "lattice"}, np.array([-401], "<i2").tobytes() + bytes(8)),
        ({"name": "lattice"}, b"\0"),
        ({"name": "lattice"}, bytes(2) + b"\xff" * 8),
        ({"name": "fp16"}, np.array([np.inf, 0, 0, 0], "<f2").tobytes()),
        ({"name": "bf16"}, b"\x80\x7f" + bytes(6)),
        ({"name": "identity"}, np.array([np.nan, 0, 0, 0], "<f4").tobytes()),
    ],
)
def test_hand_made_bodies_are_refused(config, body):
    layout = Layout.flat(4)
    codec = from_config("codec", config)
    assert len(body) <= codec.max_body_bytes(layout)
    with pytest.raises(DecodeError):
        codecs.decode(reframed(codec, layout, body), layout)


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), max_size=40))
def test_packed_codes(bits, numbers):
    codes = np.array(numbers, np.int32).reshape(-1) & ((1 << bits) - 1)
    body = pack(codes, bits)
    assert np.array_equal(unpack(body, codes.size, bits), codes)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert int.from_bytes(body, "little") == number
    spare = 8 * len(body) - bits * codes.size
    if spare:
        with pytest.raises(DecodeError, match="padding"):
            unpack(body[:-1] + bytes([body[-1] | 128]), codes.size, bits)
    for wrong in (body + b"\0", body[:-1]):
        if wrong != body:
            with pytest.raises(DecodeError):
                unpack(wrong, codes.size, bits)


def test_payload_of_another_codec_is_refused():
    layout = Layout.flat(4)
    payload = build("codec", "sign").encode(np.ones(4, "f4"), layout)
    with pytest.raises(DecodeError, match="codec 'sign'"):
        build("codec", "fp16").decode(payload, layout)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("uniform", {"bits": 0}),
        ("uniform", {"bits": 17}),
        ("uniform", {"bucket": 0}),
        ("uniform", {"bits": 1, "rounding": "dithered"}),
        ("log", {"bits": 1}),
        ("log", {"bits": 9}),
        ("codebook", {"bits": 9}),
        ("codebook", {"iterations": -1}),
        ("lattice", {"step": 0.0}),
        ("lattice", {"step": 5.0}),
        ("lattice", {"margin": -0.1}),
        ("ternary", {"clip_sigma": -1.0}),
        ("top_k", {"fraction": 0.0}),
        ("top_k", {"fraction": 1.5}),
        ("error_feedback", {"inner": "sign", "decay": 2.0}),
    ],
)
def test_wrong_options_say_what_to_do(name, options):
    with pytest.raises(ConfigError, match=r"codec\."):
        build("codec", name, **options)


NESTING = [
    (name, key)
    for name, cls in table("codec").items()
    for key, option in fields(cls).items()
    if option.type is Codec
]


@pytest.mark.parametrize(("name", "key"), NESTING)
def test_error_feedback_is_outermost(name, key):
    """Inside another codec nobody would keep its residual."""
    feedback = build("codec", "error_feedback", inner="sign")
    with pytest.raises(ConfigError, match="error_feedback must be outermost"):
        build("codec", name, **{key: feedback})


def test_crc_alone_does_not_protect():
    # The mutations above reach the body: resealing makes the checksum right again.
    payload = build("codec", "identity").encode(np.ones(4, "f4"), Layout.flat(4))
    assert resealed(payload, lambda content: None) == payload
    assert zlib.crc32(payload[7:], zlib.crc32(payload[:3])) == int.from_bytes(
        payload[3:7], "little"
    )
