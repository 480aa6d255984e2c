"""Laws of the codecs at the frontier: trellis, dither, scales, low rank, rate control."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from fedq import DecodeError, Layout, build, codecs, wire
from fedq.codecs import _rdo, _scales, _trellis
from fedq.errors import ConfigError

WIDE = Layout.of({"w": np.empty((64, 300)), "b": np.empty(64), "v": np.empty((40, 80))})


def gaussian(d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(d).astype(np.float32)


def update(layout: Layout, seed: int = 0, rank: int = 3) -> np.ndarray:
    """Return a vector like an update: low rank and noise, rows and columns of many scales."""
    rng = np.random.default_rng(seed)
    parts = []
    for tensor in layout:
        rows, columns = tensor.rows, tensor.size // tensor.rows
        noise = rng.standard_normal((rows, columns)) * rng.lognormal(0, 1, (rows, 1))
        signal = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
        parts.append((signal + 0.3 * noise * rng.lognormal(0, 1, columns)).ravel())
    return (1e-3 * np.concatenate(parts)).astype(np.float32)


def nmse(x: np.ndarray, y: np.ndarray) -> float:
    error = y.astype(np.float64) - x
    return float(error @ error) / float(x.astype(np.float64) @ x)


# --- trellis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [8, 64])
def test_search_stays_on_the_trellis(states):
    levels = _trellis.search(3 * gaussian(70_000), states)
    table, state = _trellis.transitions(states), 0
    for level in levels.tolist():
        assert level & 1 == state & 1
        state = table[state, level >> 1 & 1]


@pytest.mark.parametrize("states", [8, 64])
def test_trellis_error_is_what_the_law_assumes(states):
    y = np.random.default_rng(0).uniform(0, 4, 200_000).astype(np.float32)
    error = float(np.mean((y - _trellis.search(y, states)) ** 2))
    assert error == pytest.approx(_trellis.ERROR[states], rel=0.01)
    assert error < 1 / 3  # of the even integers alone


def test_unrolled_search_is_the_general_one():
    y = 5 * gaussian(40_000, seed=1)
    levels = np.empty(y.size, np.int32)
    _trellis._search(y, _trellis._predecessors(8), np.empty(1 << 15, np.uint64), levels)
    assert np.array_equal(levels, _trellis.search(y, 8))


def test_every_state_has_two_ways_in():
    for states in (8, 64):
        assert np.bincount(_trellis.transitions(states).ravel()).tolist() == [2] * states


def test_search_is_invariant_under_shifts_by_four():
    y = gaussian(3000)
    assert np.array_equal(_trellis.search(y + np.float32(8), 8), _trellis.search(y, 8) + 8)


# --- dither -----------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [8, 64])
def test_dtcq_error_is_independent_of_the_vector(states):
    layout = Layout.flat(60_000)
    codec = build("codec", "dtcq", step=0.5, states=states, sampling=False)
    spread = []
    for x in (gaussian(layout.size), np.full(layout.size, 0.3, np.float32)):
        error = codec.decode(codec.encode(x, layout, seed=3), layout).astype(np.float64) - x
        assert abs(error.mean()) < 6 * error.std() / np.sqrt(error.size)
        assert abs(np.corrcoef(error, x + 1e-9 * error)[0, 1]) < 0.03 or np.ptp(x) == 0
        spread.append(error.std() / (0.5 * np.sqrt(_trellis.ERROR[states])))
    # The step of each coordinate depends on its scale, within a factor of two.
    assert all(0.5 < s <= 1.01 for s in spread)


@pytest.mark.parametrize("name", ["dtcq", "low_rank", "subset"])
@pytest.mark.parametrize("bits", [0.3, 1.0])
def test_errors_of_many_clients_average_out(name, bits):
    """``n NMSE(n) / NMSE(1)`` is 1: the definition of EDEN and QUIC-FL."""
    x, n = update(WIDE), 100
    codec = build("codec", name, bits=bits)
    total, single = np.zeros(x.size), 0.0
    for seed in range(n):
        y = codec.decode(codec.encode(x, WIDE, seed), WIDE).astype(np.float64)
        total += y
        single += nmse(x, y) / n
    assert n * nmse(x, total / n) / single == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(("states", "most"), [(8, 1.19), (64, 1.13)])
def test_dtcq_comes_close_to_the_unbiased_gaussian_bound(states, most):
    """Only with contexts that settle, as those of even scales do."""
    layout, x = Layout.flat(1 << 18), gaussian(1 << 18)
    assert _scales.Profile(x, layout).at(0.5, _scales.law(True, 0.26)).even
    for bits in (1.0, 2.0, 3.0):
        codec = build("codec", "dtcq", bits=bits, states=states)
        payload = codec.encode(x, layout, seed=1)
        rate = 8 * len(payload) / x.size
        assert nmse(x, codec.decode(payload, layout)) * (4**rate - 1) < most


def test_sampling_pays_at_low_rates():
    x = update(WIDE, rank=1)
    errors = []
    for sampling in (True, False):
        codec = build("codec", "dtcq", bits=0.3, sampling=sampling)
        errors.append(
            np.mean([nmse(x, codec.decode(codec.encode(x, WIDE, s), WIDE)) for s in range(8)])
        )
    assert errors[0] < 0.8 * errors[1]


# --- scales -----------------------------------------------------------------------------------


def test_scales_round_trip():
    x = update(WIDE).copy()
    x[:300] = 0
    scales = _scales.Profile(x, WIDE).at(1e-4)
    back = _scales.decode(_scales.encode(scales, WIDE), WIDE)
    for ours, theirs in zip(scales.rows + scales.columns, back.rows + back.columns, strict=True):
        assert np.array_equal(ours, theirs)
    assert scales.rows[0][0] == _scales.DEAD


def test_zero_columns_cost_their_entropy():
    layout, rng = Layout.of({"w": np.empty((64, 4000))}), np.random.default_rng(0)
    live = rng.random(4000) > 0.2
    x = (rng.standard_normal((64, 4000)) * live).astype(np.float32).ravel()
    law = _scales.law(True, _trellis.ERROR[8])
    side = _scales.encode(_scales.Profile(x, layout).at(1.0, law), layout)
    assert 8 * len(side) < 1.1 * 4000 * 0.722 + 200  # the entropy of 0.2


@pytest.mark.parametrize("bits", [0.05, 0.025, 0.0125])
def test_where_scales_would_cost_more_than_they_gain_there_are_none(bits):
    """A dead unit's columns are zero, and to say which takes more than all bits there are."""
    layout = Layout.of({"w": np.empty((64, 3000)), "b": np.empty(64)})
    x, live = update(layout).copy(), np.random.default_rng(0).random(3000) > 0.4
    x[: 64 * 3000] *= np.tile(live, 64)
    errors = {}
    for name in ("dtcq", "eden"):
        codec = build("codec", name, bits=bits)
        payloads = [codec.encode(x, layout, seed) for seed in range(4)]
        assert len(payloads[0]) < 1.05 * bits * x.size / 8 or name == "eden"
        errors[name] = np.mean([nmse(x, codec.decode(p, layout)) for p in payloads])
    assert errors["dtcq"] < errors["eden"]


@pytest.mark.parametrize("name", ["dtcq", "subset"])
def test_zero_rows_are_exact(name):
    x = update(WIDE).copy()
    x[300:900] = 0
    codec = build("codec", "dtcq", bits=0.5)
    y = codec.decode(codec.encode(x, WIDE, seed=1), WIDE)
    assert not y[300:900].any()


@pytest.mark.parametrize("sampling", [True, False])
def test_law_is_monotone_and_continuous(sampling):
    law = _scales.law(sampling, 0.26)
    assert (np.diff(law.keep) >= 0).all()
    assert (np.diff(law.multiplier) >= -1e-12).all()
    assert (law.multiplier[1:] / law.multiplier[:-1] < 1.5).all()
    assert (np.diff(law.bits) >= 0).all()
    assert (law.keep == _scales.WHOLE).all() or sampling


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("target", [2.0, 0.3, 0.01])
def test_nmse_is_met_in_the_mean(target, sampling):
    x = update(WIDE)
    codec = build("codec", "dtcq", nmse=target, sampling=sampling)
    errors = [nmse(x, codec.decode(codec.encode(x, WIDE, s), WIDE)) for s in range(40)]
    slack = 5 * np.std(errors) / np.sqrt(len(errors)) / target
    assert np.mean(errors) == pytest.approx(target, rel=0.03 + slack)


# --- rate control -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtcq", "low_rank", "rdo_tcq", "subset"])
@pytest.mark.parametrize("bits", [0.4, 1.5])
def test_bits_are_met(name, bits):
    layout = Layout.of({"w": np.empty((256, 512)), "b": np.empty(256)})
    x = update(layout)
    payload = build("codec", name, bits=bits).encode(x, layout, seed=1)
    assert 8 * len(payload) / x.size == pytest.approx(bits, rel=0.04)


@pytest.mark.parametrize("name", ["dtcq", "low_rank", "subset"])
def test_bits_out_of_reach_do_not_drown_a_vector_in_noise(name):
    """What a frame costs is beyond the target here; no step helps, and steps stay sane."""
    layout, x = Layout.flat(36), gaussian(36)
    codec = build("codec", name, bits=0.5)
    for seed in range(20):
        assert nmse(x, codec.decode(codec.encode(x, layout, seed), layout)) < 400


@pytest.mark.parametrize("bits", [0.3, 1.0])
@pytest.mark.parametrize("name", ["rdo_tcq", "low_rank"])
def test_bits_are_met_on_the_cliff(name, bits):
    """Where all coordinates are alike, a little more of a step loses most of them at once."""
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    inner = {"inner": build("codec", "rdo_tcq")} if name == "low_rank" else {}
    payload = build("codec", name, bits=bits, **inner).encode(x, Layout.flat(x.size), seed=1)
    assert 8 * len(payload) / x.size == pytest.approx(bits, rel=0.03)


def test_nmse_is_met_with_a_prediction():
    x = update(WIDE)
    codec = build("codec", "low_rank", nmse=0.05)
    errors = [nmse(x, codec.decode(codec.encode(x, WIDE, s), WIDE)) for s in range(10)]
    assert np.mean(errors) == pytest.approx(0.05, rel=0.1)


def test_nmse_is_met_by_measurement_where_nothing_is_dithered():
    x = update(WIDE)
    codec = build("codec", "rdo_tcq", nmse=0.1, gain=False)
    assert nmse(x, codec.decode(codec.encode(x, WIDE), WIDE)) == pytest.approx(0.1, rel=0.1)


def test_the_step_does_not_depend_on_the_seed():
    """Else the choice of the step would see the dither, and the mean could be off."""
    x = update(WIDE)
    for name in ("dtcq", "low_rank"):
        codec = build("codec", name, bits=0.5)
        heads = set()
        for seed in range(5):
            frame = wire.open_frame(codec.encode(x, WIDE, seed), WIDE)
            heads.add(bytes(frame.body[:4]))
        assert len(heads) == 1


@pytest.mark.parametrize("name", ["dtcq", "low_rank", "rdo_tcq"])
def test_goals_are_checked(name):
    for options in ({"bits": 0.0}, {"bits": 17.0}, {"nmse": -1.0}, {"nmse": 0.1, "step": 0.1}):
        with pytest.raises(ConfigError, match=r"codec\."):
            build("codec", name, **options)


# --- low rank ---------------------------------------------------------------------------------


def test_low_rank_pays_where_there_is_low_rank():
    layout = Layout.of({"w": np.empty((128, 256))})
    x = update(layout, rank=2)
    errors = {}
    for name in ("dtcq", "low_rank"):
        codec = build("codec", name, bits=0.7)
        errors[name] = nmse(x, codec.decode(codec.encode(x, layout, seed=1), layout))
    assert errors["low_rank"] < 0.5 * errors["dtcq"]


def test_low_rank_costs_little_where_there_is_none():
    layout = Layout.of({"w": np.empty((128, 256))})
    x = gaussian(layout.size)
    errors = {}
    for name in ("dtcq", "low_rank"):
        codec = build("codec", name, bits=1.0)
        errors[name] = nmse(x, codec.decode(codec.encode(x, layout, seed=1), layout))
    assert errors["low_rank"] < 1.1 * errors["dtcq"]


def test_ranks_and_sizes_out_of_range_are_refused():
    layout = Layout.of({"w": np.empty((64, 64))})
    codec = build("codec", "low_rank", bits=1.0)
    zeros = np.zeros(4096, np.float32)
    inner = codec.inner._encode_at(zeros, _scales.Profile(zeros, layout), layout, 0, 0.0)
    for head in (b"\x21\0", b"\xff\0", b"\0\4", b"\0", b""):
        side = wire.varint(len(head)) + head
        body = struct.pack("<f", 1e-3) + side + inner
        with pytest.raises(DecodeError):
            codecs.decode(wire.seal_frame(codec, layout, 0, body), layout)
    good = struct.pack("<f", 1e-3) + wire.varint(2) + b"\0\0" + inner
    assert not codecs.decode(wire.seal_frame(codec, layout, 0, good), layout).any()


# --- rdo --------------------------------------------------------------------------------------


def test_gain_restores_what_is_along_the_vector():
    x = update(WIDE)
    codec = build("codec", "rdo_tcq", bits=0.5)
    y = codec.decode(codec.encode(x, WIDE), WIDE).astype(np.float64)
    assert y @ x == pytest.approx(float(x.astype(np.float64) @ x), rel=1e-4)


def test_weight_trades_error_for_bits():
    x = update(WIDE)
    sizes, errors = [], []
    for weight in (0.0, 0.1, 0.5):
        codec = build("codec", "rdo_tcq", step=2e-4, weight=weight, gain=False)
        payload = codec.encode(x, WIDE)
        sizes.append(len(payload))
        errors.append(nmse(x, codec.decode(payload, WIDE)))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_values_name_the_levels_of_the_search():
    y = 4 * gaussian(5000)
    values = _rdo.quantize(y, [(5000, 50)], 0.1, 8)
    out = np.empty(y.size, np.float32)
    _rdo.restore(values, _trellis.transitions(8), 1.0, out)
    assert np.abs(out - y).max() <= 4
    assert float(np.mean((out - y) ** 2)) < 1.5


# --- hostile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtcq", "rdo_tcq", "low_rank"])
@pytest.mark.parametrize("step", [np.nan, np.inf, -np.inf, -1.0])
def test_steps_that_no_encoder_writes_are_refused(name, step):
    codec = build("codec", name, bits=1.0)
    body = bytes(wire.open_frame(codec.encode(update(WIDE), WIDE), WIDE).body)
    body = struct.pack("<f", step) + body[4:]
    with pytest.raises(DecodeError):
        codecs.decode(wire.seal_frame(codec, WIDE, 0, body), WIDE)


def test_headers_are_short():
    for name in ("dtcq", "low_rank", "rdo_tcq", "subset"):
        codec = build("codec", name, bits=0.25)
        assert len(wire.seal_frame(codec, WIDE, 2**32 - 1, b"")) <= 32
