"""Buffered asynchronous aggregation: as the textbook has it, in any order, after any stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedq import Layout, build, config, registry, simulation
from fedq.asynchronous import Waiting
from fedq.attacks.alie import Alie
from fedq.attacks.base import Attack, View
from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.engines.adversary import Adversary
from fedq.errors import ConfigError
from fedq.guard import Guard
from fedq.layout import Vector
from fedq.physics.clock import Clock
from fedq.random import derive, generator
from fedq.records import unpack
from fedq.rounds import RoundReport, ServerState
from fedq.strategy import FedQ
from tests.grids import InlineGrid

# isort: split
from flwr.app import Message

LAYOUT = Layout.flat(50)
CLIENTS = 12
MACS = [1e9 * (1 + place % 5) for place in range(CLIENTS)]


def pull(message: Message, partition: int) -> Message:
    """Client i pulls the model a third of the way towards i: what it sends depends on the base."""
    task = Task.open(message, LAYOUT)
    delta = (np.float32(partition) - task.weights) / np.float32(3)
    return task.reply(delta, examples=1 + partition, client=partition, loss=1.0)


def make(
    pacing: object, fleet: object | None = None, macs: list[float] | None = None, **options: object
) -> FedQ:
    fleet = fleet or build("fleet", "mixture", devices=["pi_4"], links=["wifi"])
    chosen = {
        "layout": LAYOUT,
        "codec": Identity(),
        "clock": Clock(fleet, 0, macs or MACS),  # type: ignore[arg-type]
        "pacing": pacing,
        "clients_per_round": 5,
        **options,
    }
    return FedQ(**chosen)  # type: ignore[arg-type]


def run(
    fedq: FedQ,
    steps: int,
    order: Callable[[list[Message]], list[Message]] = list,
    state: ServerState | None = None,
    handler: Any = pull,
) -> tuple[ServerState, list[RoundReport], InlineGrid]:
    grid, reports = InlineGrid(handler, CLIENTS, order), []
    state = state or fedq.initial(np.zeros(LAYOUT.size, np.float32))
    for _ in range(steps):
        state, report = fedq.run_round(grid, state)
        reports.append(report)
    return state, reports, grid


def test_with_a_whole_cohort_and_no_delays_it_is_synchronous() -> None:
    fleet = build("fleet", "mixture", devices=["pi_4"], links=["ideal"])
    alike = [1e9] * CLIENTS
    codec = build("codec", "uniform", bits=4, rounding="dithered")
    buffered, reports, _ = run(
        make(build("pacing", "fedbuff", buffer=5), fleet, alike, codec=codec), 6
    )
    rounds, others, _ = run(make(build("pacing", "synchronous"), fleet, alike, codec=codec), 6)
    assert buffered.weights.tobytes() == rounds.weights.tobytes()
    assert buffered.waiting == ()
    for report, other in zip(reports, others, strict=True):
        assert (report.sampled, report.replies, report.uplink_bytes, report.joules) == (
            *(other.sampled, other.replies, other.uplink_bytes),
            other.joules,
        )


class Textbook:
    """Algorithm 1 of the paper, one event at a time, each client run when it is asked."""

    def __init__(self, fedq: FedQ, buffer: int, at_work: int) -> None:
        self.fedq, self.buffer, self.at_work = fedq, buffer, at_work
        self.weights = np.zeros(LAYOUT.size, np.float64)
        self.air: list[tuple[float, int, int, Vector]] = []
        self.now = 0.0

    def step(self, number: int, lengths: dict[tuple[int, int], Any]) -> None:
        asked: set[int] = set()
        batches, total, mass, count = 0, np.zeros(LAYOUT.size), 0.0, 0
        while True:
            busy = {place for _, place, _, _ in self.air} | asked
            free = [place for place in range(CLIENTS) if place not in busy]
            wanted = min(self.at_work - len(self.air), len(free))
            if wanted > 0:
                path = ("sample", batches) if batches else ("sample",)
                rng = generator(derive(0, number, *path))
                batches += 1
                for i in sorted(rng.choice(len(free), wanted, replace=False, shuffle=False)):
                    place = free[i]
                    asked.add(place)
                    down, up = lengths[number, place]
                    assert self.fedq.clock is not None
                    exchange = self.fedq.clock.exchange(place, number, down_bytes=down, up_bytes=up)
                    delta = (place - self.weights) / 3
                    self.air.append((self.now + exchange.seconds, place, number, delta))
            self.air.sort(key=lambda event: event[:2])
            self.now = max(self.now, self.air[0][0])
            while self.air and self.air[0][0] <= self.now and count < self.buffer:
                _, place, version, delta = self.air.pop(0)
                total += (1 + place) * delta / np.sqrt(1 + number - version)
                mass += 1 + place
                count += 1
            if count == self.buffer:
                break
        self.weights = self.weights + total / mass


def test_it_is_the_textbook() -> None:
    steps, buffer = 8, 3
    fedq = make(build("pacing", "fedbuff", buffer=buffer))
    state, reports, grid = run(fedq, steps)
    lengths = {}
    for message in grid.seen:
        down = len(unpack(message.content))
        place = message.metadata.dst_node_id - 2
        up = len(unpack(pull(message, place).content))
        lengths[int(message.metadata.group_id), place] = down, up
    book = Textbook(fedq, buffer, 5)
    for number in range(1, steps + 1):
        book.step(number, lengths)
    assert state.now_s == pytest.approx(book.now, rel=1e-12)
    np.testing.assert_allclose(state.weights, book.weights, rtol=1e-5)
    assert sum(report.replies for report in reports) == steps * buffer
    waiting = {(w.place, w.asked.round) for w in state.waiting}
    assert waiting == {(place, version) for _, place, version, _ in book.air}
    assert any(w.asked.round < steps for w in state.waiting)  # else nothing was ever stale


ROUGH = registry.from_config(
    "fleet",
    {
        "name": "mixture",
        "devices": ["pi_5", "pi_zero_2_w"],
        "links": ["wifi", "nb_iot"],
        "straggler_sigma": 0.5,
        "dropout": 0.1,
        "availability": {"name": "bernoulli", "probability": 0.7, "slot_s": 5.0},
    },
)


def attacked(
    attack: Attack,
    steps: int,
    order: Callable[[list[Message]], list[Message]] = list,
    buffer: int = 4,
    **options: object,
) -> tuple[ServerState, list[RoundReport], list[int]]:
    """Run under attack; return what came of it, and how many attackers each buffer had."""
    fedq = make(build("pacing", "fedbuff", buffer=buffer), ROUGH, quorum=0.1, **options)
    inner = InlineGrid(pull, CLIENTS, order)
    grid = Adversary(inner, attack, LAYOUT, fedq.codec, 0, asynchronous=True)
    state, reports, found = fedq.initial(np.zeros(LAYOUT.size, np.float32)), [], []
    for _ in range(steps):
        state, report = fedq.run_round(grid, state)
        reports.append(report)
        found.append(grid.asked)
    return state, reports, found


def facts(report: RoundReport) -> tuple[object, ...]:
    return (
        report.simulated_seconds,
        report.joules,
        dict(report.rejected),
        report.uplink_bytes,
        report.downlink_bytes,
        report.sampled,
        report.replies,
    )


def test_the_order_of_work_changes_nothing() -> None:
    found = []
    for order in (list, lambda messages: messages[::-1]):
        fedq = make(build("pacing", "fedbuff", buffer=3), ROUGH, quorum=0.1)
        state, reports, _ = run(fedq, 10, order)
        found.append((state.weights.tobytes(), state.now_s, state.waiting, [*map(facts, reports)]))
    assert found[0] == found[1]
    rejected = [dict(report.rejected) for report in reports]
    assert any("dropout" in kinds for kinds in rejected)
    assert any("away" in kinds for kinds in rejected)


@pytest.mark.parametrize("cut", [1, 4])
def test_a_stopped_run_goes_on_as_if_it_had_not(cut: int) -> None:
    fedq = make(build("pacing", "fedbuff", buffer=3), ROUGH, quorum=0.1)
    whole, reports, _ = run(fedq, 8)
    half, _, _ = run(make(build("pacing", "fedbuff", buffer=3), ROUGH, quorum=0.1), cut)
    kept = tuple(Waiting.from_meta(w.to_meta(), w.content) for w in half.waiting)
    assert kept == half.waiting
    again = make(build("pacing", "fedbuff", buffer=3), ROUGH, quorum=0.1)
    state, rest, _ = run(again, 8 - cut, state=half)
    assert state.weights.tobytes() == whole.weights.tobytes()
    assert [*map(facts, rest)] == [*map(facts, reports[cut:])]
    assert (state.now_s, state.waiting) == (whole.now_s, whole.waiting)


def test_nobody_is_asked_twice_in_a_step_and_few_are_at_work() -> None:
    fedq = make(build("pacing", "fedbuff", buffer=9), clients_per_round=4)
    state, reports, grid = run(fedq, 6)
    asked = [(m.metadata.group_id, m.metadata.dst_node_id) for m in grid.seen]
    assert len(set(asked)) == len(asked) == sum(report.sampled for report in reports)
    assert sum(r.sampled - r.replies for r in reports) == len(state.waiting) <= 4
    assert all(report.replies == 9 for report in reports)


def test_if_all_were_asked_the_server_steps_with_what_it_has() -> None:
    fedq = make(build("pacing", "fedbuff", buffer=20), clients_per_round=4)
    state, (report,), _ = run(fedq, 1)
    assert (report.sampled, report.replies, report.skipped) == (CLIENTS, CLIENTS, False)
    assert state.waiting == ()
    strict = make(build("pacing", "fedbuff", buffer=30), clients_per_round=4)
    _, (report,), _ = run(strict, 1)
    assert report.skipped  # below the quorum of the buffer


def test_old_updates_count_less() -> None:
    pacing = build("pacing", "fedbuff")
    assert [pacing.discount(s) for s in (0, 1, 3)] == [1.0, 2**-0.5, 0.5]
    assert build("pacing", "fedbuff", exponent=0.0).discount(9) == 1.0


def test_it_is_faster_where_devices_differ() -> None:
    """By the clock, for as many updates: nobody waits for the slowest."""
    macs = [1e9] * 10 + [1e11] * 2
    fedbuff, a, _ = run(make(build("pacing", "fedbuff", buffer=5), macs=macs), 8)
    rounds, b, _ = run(make(build("pacing", "synchronous"), macs=macs), 8)
    assert sum(r.replies for r in a) == sum(r.replies for r in b)
    assert fedbuff.now_s < rounds.now_s / 3


def test_codecs_and_downlink_changes_go_with_the_model_that_was_sent() -> None:
    """A predictive downlink, dither and error feedback over steps of different ages."""
    codec = build("codec", "uniform", bits=6, rounding="dithered")
    fedq = make(
        build("pacing", "fedbuff", buffer=3),
        codec=codec,
        downlink=build("codec", "lattice"),
        history=4,
        guard=Guard(),
    )
    _, reports, _ = run(fedq, 12)
    assert sum(report.rejected.total() for report in reports) == 0
    assert all(report.replies == 3 for report in reports)


def test_a_reply_of_another_step_is_stale() -> None:
    old: dict[int, Message] = {}

    def replay(message: Message, partition: int) -> Message:
        fresh = pull(message, partition)
        kept = old.setdefault(partition, fresh)
        return Message(kept.content, reply_to=message)

    fedq = make(build("pacing", "fedbuff", buffer=3), quorum=0.1)
    _, reports, _ = run(fedq, 3, handler=replay)
    assert reports[0].rejected.total() == 0
    assert any(report.rejected["stale"] for report in reports[1:])


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "mean"])
def test_robust_rules_see_a_buffer_whatever_was_lost(rule: str) -> None:
    fedq = make(
        build("pacing", "fedbuff", buffer=4),
        ROUGH,
        aggregator=build("aggregator", rule),
        quorum=0.3,
    )
    _, reports, _ = run(fedq, 8)
    assert sum(report.rejected.total() for report in reports) > 0
    assert not any(report.rejected["aggregator"] or report.skipped for report in reports)
    assert {report.replies for report in reports} == {4}


def test_a_reply_under_way_is_not_passed_over_for_want_of_others(tmp_path: Path) -> None:
    """Time does not jump to when somebody can be asked while there are replies to come."""
    file = tmp_path / "trace.csv"
    rows = [f"{place},0,{'2.0' if place else '1e9'}" for place in range(CLIENTS)]
    file.write_text("\n".join(["client,start_s,end_s", *rows]))
    fleet = registry.from_config(
        "fleet",
        {
            "name": "mixture",
            "devices": ["pi_4"],
            "links": ["wifi"],
            "availability": {"name": "trace", "path": str(file), "period_s": 2e9},
        },
    )
    fedq = make(build("pacing", "fedbuff", buffer=1), fleet, [1e9] * CLIENTS, quorum=0.1)
    state, reports, _ = run(fedq, 4)
    assert [report.replies for report in reports] == [1, 1, 1, 1]
    assert state.now_s < 5


@pytest.mark.parametrize("options", [{"buffer": 0}, {"exponent": -1.0}])
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"pacing\."):
        build("pacing", "fedbuff", **options)


# --- under attack --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alie", "gaussian", "stale_base", "wrong_seed"])
def test_an_attack_on_buffers_is_the_same_in_any_order_of_work(name: str) -> None:
    attack = build("attack", name, fraction=0.3)
    codec = build("codec", "uniform", bits=6, rounding="dithered")
    one, reports, found = attacked(attack, 8, codec=codec)
    other, again, _ = attacked(attack, 8, lambda messages: messages[::-1], codec=codec)
    assert one.weights.tobytes() == other.weights.tobytes()
    assert [*map(facts, reports)] == [*map(facts, again)]
    assert (one.now_s, one.waiting) == (other.now_s, other.waiting)
    honest, _, _ = attacked(build("attack", "none"), 8, codec=codec)
    assert one.weights.tobytes() != honest.weights.tobytes()
    kinds = {kind for report in reports for kind in report.rejected}
    assert ("seed" in kinds) == (name == "wrong_seed")
    assert not kinds & {"stale", "malformed", "unexpected"}
    assert 0 < sum(found) < sum(report.received for report in reports)


def test_attackers_see_the_buffer_that_they_are_in() -> None:
    seen: list[tuple[int, list[int], list[int]]] = []

    class Watching(Alie):
        def forge(self, view: View) -> list[bytes]:
            rounds = [reply.message.metadata["round"] for reply in (*view.own, *view.others)]
            seen.append((view.round, [reply.client for reply in view.own], rounds))
            return super().forge(view)

    attack = Watching(fraction=0.3)
    _, reports, found = attacked(attack, 8)
    hostile = attack.hostile(CLIENTS, 0)
    replies = {report.round: report.received for report in reports}
    assert all(len(rounds) == replies[step] for step, _, rounds in seen)
    assert all(set(own) <= set(hostile) for _, own, _ in seen)
    assert sum(len(own) for _, own, _ in seen) == sum(found)
    assert any(min(rounds) < step for step, _, rounds in seen)  # updates of different ages


def test_an_attack_on_bytes_changes_no_time_and_a_robust_rule_stands() -> None:
    """What hostile clients send takes the time of the honest replies in its place."""
    honest, reports, _ = attacked(build("attack", "none"), 8, buffer=5)
    attack = build("attack", "sign_flip", fraction=0.2, scale=20.0)
    loose = Guard(norm_limit=None, peak_limit=None)
    fallen, others, _ = attacked(attack, 8, buffer=5, guard=loose)
    median = build("aggregator", "median")
    robust, _, _ = attacked(attack, 8, buffer=5, guard=loose, aggregator=median)
    assert fallen.now_s == honest.now_s == robust.now_s
    assert [report.joules for report in others] == [report.joules for report in reports]
    lost = [np.abs(state.weights - honest.weights).mean() for state in (fallen, robust)]
    assert lost[1] < lost[0] / 4


def test_a_run_under_attack_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    small = ["data=digits", "clients=9", "clients_per_round=5", "local_epochs=1", "rounds=3"]
    small += ["baseline=false", "model=mlp", "model.hidden=[8]", "fleet=mixed_iot"]
    small += ["pacing=fedbuff", "pacing.buffer=3", "attack=min_max", "attack.fraction=0.4"]
    digests = []
    for workers in (1, 2):
        more = [f"engine.workers={workers}", f"run_dir={tmp_path / str(workers)}"]
        (done,) = simulation.simulate(config.load([*small, *more]))
        assert done.summary["attackers"] > 0
        digests.append(done.summary["model_sha256"])
    assert digests[0] == digests[1]
