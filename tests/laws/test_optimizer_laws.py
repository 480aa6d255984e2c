"""Laws of every registered server optimiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedq import ConfigError, available, build
from fedq.optimizers import ServerOptimizer
from fedq.registry import from_config, lookup, to_config

CASES = [
    pytest.param(build("server_optimizer", name, **options), id=f"{name}-{options}")
    for name in available("server_optimizer")
    for options in lookup("server_optimizer", name).examples
]
every = pytest.mark.parametrize("optimizer", CASES)
D = 50


def vectors(count: int, scale: float = 1e-2, seed: int = 0) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [(scale * rng.normal(size=D)).astype(np.float32) for _ in range(count)]


def textbook(o: ServerOptimizer, w: float, updates: list[float]) -> tuple[float, dict[str, float]]:
    """Algorithm 2 of Reddi et al. for one coordinate, in plain Python."""
    m, v = 0.0, getattr(o, "tau", 0.0) ** 2
    for u in updates:
        if o.name == "sgd":
            w += o.learning_rate * u
            continue
        if o.name == "momentum":
            m = o.momentum * m + u
            w += o.learning_rate * m
            continue
        m = o.beta_1 * m + (1 - o.beta_1) * u
        if o.name == "adagrad":
            v += u * u
        elif o.name == "adam":
            v = o.beta_2 * v + (1 - o.beta_2) * u * u
        elif o.name == "yogi" and v != u * u:
            v -= (1 - o.beta_2) * u * u * math.copysign(1, v - u * u)
        w += o.learning_rate * m / (math.sqrt(v) + o.tau)
    names = {"sgd": {}, "momentum": {"momentum": m}}
    return w, names.get(o.name, {"first_moment": m, "second_moment": v})


@every
def test_configuration_round_trips(optimizer: ServerOptimizer) -> None:
    assert from_config("server_optimizer", to_config(optimizer)) == optimizer


@every
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_agrees_with_the_textbook(optimizer: ServerOptimizer, scale: float) -> None:
    start, *updates = vectors(31, scale)
    weights, state = start, optimizer.init(D)
    for update in updates:
        weights, state = optimizer.step(weights, update, state)
    for j in range(D):
        w, expected = textbook(optimizer, float(start[j]), [float(u[j]) for u in updates])
        assert weights[j] == pytest.approx(w, rel=1e-4, abs=1e-5 * scale)
        for key, value in expected.items():
            assert state[key][j] == pytest.approx(value, rel=1e-5, abs=1e-6 * scale)


@every
def test_step_is_pure(optimizer: ServerOptimizer) -> None:
    weights, update = vectors(2)
    _, state = optimizer.step(weights, update, optimizer.init(D))
    before = [array.copy() for array in (weights, update, *state.values())]
    for array in (weights, update, *state.values()):
        array.flags.writeable = False
    one, two = (optimizer.step(weights, update, state) for _ in range(2))
    assert np.array_equal(one[0], two[0])
    assert all(np.array_equal(one[1][key], two[1][key]) for key in state)
    for array, old in zip((weights, update, *state.values()), before, strict=True):
        assert np.array_equal(array, old)
    one[0][:] = 0  # results are the caller's
    for array in one[1].values():
        array[:] = 0


@every
def test_state_survives_a_checkpoint(optimizer: ServerOptimizer, tmp_path) -> None:
    weights, *updates = vectors(7)
    straight, state = weights, optimizer.init(D)
    for update in updates:
        straight, state = optimizer.step(straight, update, state)
    resumed, state = weights, optimizer.init(D)
    for update in updates:
        np.savez(tmp_path / "state.npz", **state)
        with np.load(tmp_path / "state.npz") as file:
            resumed, state = optimizer.step(resumed, update, dict(file))
    assert np.array_equal(straight, resumed)


@every
def test_state_is_named_float32_vectors_of_one_shape(optimizer: ServerOptimizer) -> None:
    state = optimizer.init(D)
    _, after = optimizer.step(*vectors(2), state)
    assert state.keys() == after.keys()
    for array in [*state.values(), *after.values()]:
        assert array.dtype == np.float32
        assert array.shape == (D,)


@every
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-8, 1e-3, 1.0]))
def test_first_step_goes_where_the_update_points(
    optimizer: ServerOptimizer, seed: int, scale: float
) -> None:
    update = vectors(1, scale, seed)[0]
    moved, _ = optimizer.step(np.zeros(D, np.float32), update, optimizer.init(D))
    assert np.array_equal(np.sign(moved), np.sign(update))


@every
def test_zero_updates_move_nothing_at_first(optimizer: ServerOptimizer) -> None:
    weights, zero = vectors(1)[0], np.zeros(D, np.float32)
    moved, _ = optimizer.step(weights, zero, optimizer.init(D))
    assert np.array_equal(moved, weights)


@settings(max_examples=100, deadline=None)
@given(
    w=st.floats(-(2.0**40), 2.0**40, width=32),
    u=st.floats(-(2.0**40), 2.0**40, width=32),
)
def test_fedavg_adds_exactly(w: float, u: float) -> None:
    weights, update = np.array([w], np.float32), np.array([u], np.float32)
    moved, state = build("server_optimizer", "sgd").step(weights, update, {})
    assert moved[0] == weights[0] + update[0]
    assert state == {}


def test_momentum_without_memory_is_sgd() -> None:
    memoryless = build("server_optimizer", "momentum", momentum=0.0, learning_rate=0.7)
    sgd = build("server_optimizer", "sgd", learning_rate=0.7)
    weights, update = vectors(2)
    assert np.array_equal(
        memoryless.step(weights, update, memoryless.init(D))[0], sgd.step(weights, update, {})[0]
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_second_moments_keep_their_bounds(seed: int) -> None:
    """Adam's v lies between v and u**2; Yogi's moves towards u**2 by (1 - beta_2) u**2, whatever v.

    Adagrad's never shrinks.
    """
    update = vectors(1, 0.05, seed)[0]
    square = update.astype(np.float64) ** 2
    v = np.random.default_rng(seed).random(D).astype(np.float32) * np.float32(0.005)
    after = {}
    for name in ("adam", "yogi", "adagrad"):
        optimizer = build("server_optimizer", name)
        state = {"first_moment": np.zeros(D, np.float32), "second_moment": v}
        after[name] = optimizer.step(update, update, state)[1]["second_moment"].astype(np.float64)
    slack = 1e-9
    assert (after["adam"] >= np.minimum(v, square) - slack).all()
    assert (after["adam"] <= np.maximum(v, square) + slack).all()
    change = after["yogi"] - v
    assert np.allclose(np.abs(change), 0.01 * square, atol=slack)
    clear = np.abs(v - square) > 1e-6
    towards = np.sign(square - v)
    seen = clear & (square > 1e-6)
    assert np.array_equal(np.sign(change)[seen], towards[seen])
    assert (after["yogi"] >= 0).all()
    assert (after["adagrad"] >= v).all()


def test_adaptive_steps_are_bounded_by_the_learning_rate() -> None:
    """|m| <= sqrt(v / (1 - beta_2)) for one update: the step is scale-free when tau is small."""
    for scale in (1e-2, 1.0, 1e3):
        optimizer = build("server_optimizer", "adam", learning_rate=0.1, beta_1=0.0, tau=1e-6)
        update = np.full(1, scale, np.float32)
        moved, _ = optimizer.step(np.zeros(1, np.float32), update, optimizer.init(1))
        assert moved[0] == pytest.approx(0.1 / math.sqrt(0.01), rel=1e-2)


@every
def test_wrong_arguments_are_refused(optimizer: ServerOptimizer) -> None:
    weights, update = vectors(2)
    state = optimizer.init(D)
    with pytest.raises(ConfigError, match="update must be float32"):
        optimizer.step(weights, update[:-1], state)
    with pytest.raises(ConfigError, match="update must be float32"):
        optimizer.step(weights, update.astype(np.float64), state)
    with pytest.raises(ConfigError, match="weights must be float32"):
        optimizer.step(weights[None], update, state)
    with pytest.raises(ConfigError, match="resume with the optimiser"):
        optimizer.step(weights, update, {**state, "other": update})
    for bad in (np.nan, np.inf):
        with pytest.raises(ConfigError, match="NaN or infinity"):
            optimizer.step(weights, np.where(np.arange(D) == 3, np.float32(bad), update), state)


def test_overflow_is_an_error_not_an_infinity() -> None:
    big = np.full(1, 3e38, np.float32)
    with pytest.raises(ConfigError, match="range of float32"):
        build("server_optimizer", "sgd").step(big, big, {})


@pytest.mark.parametrize("name", available("server_optimizer"))
def test_options_are_validated(name: str) -> None:
    known = {field for field in to_config(build("server_optimizer", name)) if field != "name"}
    bad = {
        "learning_rate": (0.0, -1.0, math.nan, math.inf),
        "momentum": (-0.1, 1.0, math.nan),
        "beta_1": (-0.1, 1.0, math.nan),
        "beta_2": (-0.1, 1.0, math.nan),
        "tau": (0.0, -1e-3, math.inf),
    }
    assert known <= bad.keys()
    for option in known:
        for value in bad[option]:
            with pytest.raises(ConfigError, match=option):
                build("server_optimizer", name, **{option: value})
