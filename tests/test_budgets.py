"""Bit budgets: laws of each schedule, and codecs that are asked for and checked by client."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from fedq import Layout, build, registry
from fedq.budgets import Candidate, History
from fedq.budgets.base import bits_of, with_bits
from fedq.capacity import Capacities, Capacity
from fedq.client import Task
from fedq.codecs.base import Codec
from fedq.errors import ConfigError
from fedq.physics.clock import Clock
from fedq.state import StateStore
from fedq.strategy import FedQ
from tests.grids import Handler, InlineGrid

# isort: split
from flwr.app import Message

LAYOUT = Layout.flat(400)
CODECS = [
    build("codec", "uniform", bits=4, rounding="dithered"),
    build("codec", "qsgd", levels=15),
    build("codec", "dtcq", bits=3.0),
    build("codec", "error_feedback", inner={"name": "uniform", "bits": 4}),
    build("codec", "top_k", inner={"name": "uniform", "bits": 4}),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_bits_are_what_was_asked_for(codec: Codec) -> None:
    for bits in (2, 3, 6):
        assert bits_of(with_bits(codec, bits)) == pytest.approx(bits)
    assert with_bits(codec, bits_of(codec)) == codec


@pytest.mark.parametrize("name", [n for n in registry.available("budget") if n != "fixed"])
def test_budgets_keep_their_limits(name: str) -> None:
    budget = build("budget", name, min_bits=3, max_bits=6)
    cohort = [
        Candidate(examples, rate, 1.0)
        for examples in (1, 50, 10_000, None)
        for rate in (1e-3, 1.0, 1e3)
    ]
    history = History(losses=(5.0, 1e-9), level=64.0)
    codecs = budget.codecs(CODECS[0], history, cohort, LAYOUT.size)
    assert len(codecs) == len(cohort)
    assert all(3 <= bits_of(codec) <= 6 for codec in codecs)
    assert registry.from_config("budget", registry.to_config(budget)) == budget


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dadaquant", {"min_bits": 9, "max_bits": 8}, "min_bits no more than max_bits"),
        ("dadaquant", {"patience": 0}, "patience must be at least 1"),
        ("dadaquant", {"smoothing": 1.0}, "smoothing must be in [0, 1)"),
        ("link_aware", {"seconds": -1.0}, "seconds must be positive"),
        ("adaquant", {}, "did you mean"),
    ],
)
def test_impossible_values(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build("budget", name, **options)
    assert message in str(caught.value)


def test_a_codec_without_levels_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a codec with bits or levels"):
        FedQ(layout=LAYOUT, codec=build("codec", "sign"), budget=build("budget", "dadaquant"))


def test_adaquantfl_has_more_levels_as_the_loss_falls() -> None:
    budget = build("budget", "adaquantfl")
    losses = (2.0, 1.0, 0.5, 0.25)
    factors = [budget.factors(History(losses[: k + 1]), [Candidate()], 4, 100)[0] for k in range(4)]
    np.testing.assert_allclose(factors, np.sqrt([1, 2, 4, 8]))


def test_dadaquant_keeps_the_variance_and_spends_fewer_levels() -> None:
    """Sum of w^2 / q^2 as with equal levels, sum of q no more (Hölder's inequality)."""
    budget, rng = build("budget", "dadaquant"), np.random.default_rng(0)
    for _ in range(20):
        examples = rng.integers(1, 1000, 9)
        cohort = [Candidate(int(n)) for n in examples]
        q = np.array(budget.factors(History(), cohort, 4, 100))
        w = examples / examples.sum()
        assert np.sum(w**2 / q**2) == pytest.approx(np.sum(w**2))
        assert q.sum() <= 9 * (1 + 1e-9)
    assert budget.factors(History(), [Candidate(7)] * 3, 4, 100) == [1.0] * 3
    assert budget.factors(History(), [Candidate()] * 3, 4, 100) == [1.0] * 3


def test_dadaquant_doubles_when_the_loss_stalls() -> None:
    budget, history, levels = build("budget", "dadaquant", patience=3, smoothing=0.0), History(), []
    for loss in [5, 4, 3, 2, 2, 2, 2, 2, 2, 2, 2]:
        history = budget.after(history, float(loss), {})
        levels.append(history.level)
    assert levels == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 4]
    assert History.from_meta(history.to_meta()) == history
    assert budget.after(history, None, {3: 5}).losses == history.losses


def test_slow_links_get_fewer_bits() -> None:
    budget = build("budget", "link_aware", min_bits=1, max_bits=16)
    rates = [0.01, 0.3, 1.0, 2.0, 9.0]
    factors = budget.factors(History(), [Candidate(None, r, 1.0) for r in rates], 4, 1000)
    assert factors == sorted(factors)
    assert factors[2] == 1.0
    within = build("budget", "link_aware", seconds=2.0, min_bits=1, max_bits=16)
    size = 10**6
    for rate, factor in zip(
        rates,
        within.factors(History(), [Candidate(None, r, 1.0) for r in rates], 4, size),
        strict=True,
    ):
        bits = 4 + math.log2(factor)
        assert bits == 1 or bits * size / (1e6 * rate) <= 2.0 * (1 + 1e-9)


# --- in rounds -----------------------------------------------------------------------------------


def honest(store: StateStore | None = None) -> Handler:
    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        delta = np.random.default_rng(partition).normal(size=LAYOUT.size).astype(np.float32)
        return task.reply(
            delta, examples=10 ** (1 + partition), client=partition, loss=1.0, store=store
        )

    return handle


def asked(grid: InlineGrid) -> dict[tuple[int, int], float]:
    found = {}
    for message in grid.seen:
        task = Task.open(message, LAYOUT)
        found[task.round, message.metadata.dst_node_id - 2] = bits_of(task.codec)
    return found


def test_larger_clients_get_more_bits_once_they_are_known(tmp_path: object) -> None:
    fedq = FedQ(layout=LAYOUT, codec=CODECS[0], budget=build("budget", "dadaquant"))
    grid, state = InlineGrid(honest(), 4), fedq.initial(np.zeros(LAYOUT.size, np.float32))
    for _ in range(2):
        state, report = fedq.run_round(grid, state)
        assert report.replies == 4
    bits = asked(grid)
    assert {bits[1, place] for place in range(4)} == {4}
    assert [bits[2, place] for place in range(4)] == sorted(bits[2, place] for place in range(4))
    assert bits[2, 0] < bits[2, 3]


def test_error_feedback_goes_on_from_one_width_to_another(tmp_path) -> None:  # type: ignore[no-untyped-def]
    codec = build("codec", "error_feedback", inner={"name": "uniform", "bits": 3})
    fedq = FedQ(layout=LAYOUT, codec=codec, budget=build("budget", "dadaquant", patience=1))
    grid = InlineGrid(honest(StateStore(tmp_path)), 4)
    state, widths = fedq.initial(np.zeros(LAYOUT.size, np.float32)), set()
    for _ in range(5):
        state, report = fedq.run_round(grid, state)
        assert report.replies == 4
    widths = set(asked(grid).values())
    assert len(widths) > 1


def test_devices_that_have_measured_their_links_get_codecs_by_them() -> None:
    """As simulated ones do: with the rates of the test below, by node and not by place."""
    links = {2: Capacity(0.5), 3: Capacity(), 5: Capacity(2.0), 6: Capacity(2.0)}
    fedq = FedQ(
        layout=LAYOUT,
        codec=CODECS[0],
        budget=build("budget", "link_aware"),
        capacities=lambda: Capacities(links),
    )
    grid, state = InlineGrid(honest(), 5), fedq.initial(np.zeros(LAYOUT.size, np.float32))
    state, report = fedq.run_round(grid, state)
    assert report.replies == 5
    assert asked(grid) == {(1, 0): 2, (1, 1): 4, (1, 2): 4, (1, 3): 4, (1, 4): 4}
    assert report.codecs is not None
    assert sorted(report.codecs.values()) == [1, 4]
    links |= {3: Capacity(2.0), 5: Capacity(0.5)}  # what has been measured since counts
    fedq.run_round(grid, state)
    assert asked(grid)[2, 3] == 2
    with pytest.raises(ConfigError, match="look at devices"):
        FedQ(layout=LAYOUT, codec=CODECS[0], budget=build("budget", "link_aware"))


def test_an_update_in_another_width_than_asked_is_refused() -> None:
    def stubborn(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        wide = with_bits(task.codec, 8) if partition == 1 else task.codec
        task = dataclasses.replace(task, codec=wide)
        return task.reply(np.ones(LAYOUT.size, np.float32), examples=5, client=partition)

    fleet = build("fleet", "mixture", devices=["pi_4"] * 2, links=["wifi", "nb_iot"])
    fedq = FedQ(
        layout=LAYOUT,
        codec=CODECS[0],
        budget=build("budget", "link_aware"),
        clock=Clock(fleet, 0, [1e6] * 6),
    )
    grid = InlineGrid(stubborn, 6)
    _, report = fedq.run_round(grid, fedq.initial(np.zeros(LAYOUT.size, np.float32)))
    assert set(asked(grid).values()) == {2.0, 4.0}
    assert report.replies == 5
    assert dict(report.rejected) == {"malformed": 1}
    assert "encoded by Uniform(bits=8" in report.reasons[0]
