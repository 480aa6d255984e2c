"""The physics of a fleet: time grows with bytes, energy adds up, and nothing depends on order."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedq import Layout, build, registry
from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.engines.timed import Flight, certain, nth_arrival
from fedq.errors import ConfigError, FedqError
from fedq.physics.clock import Clock, Exchange
from fedq.physics.links import Transfer
from fedq.rounds import RoundReport, ServerState
from fedq.strategy import FedQ
from tests.grids import Handler, InlineGrid, constant_client

# isort: split
from flwr.app import Message, RecordDict

LAYOUT = Layout(("a", "b"), ((20, 30), (10,)))
ZERO = np.zeros(LAYOUT.size, np.float32)
GROUPS = ("device", "link", "availability", "fleet", "pacing")
LINKS = registry.available("link")


# --- profiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_every_profile_is_its_configuration(group: str) -> None:
    for name in registry.available(group):
        for options in registry.lookup(group, name).examples:
            profile = registry.build(group, name, **options)
            assert registry.from_config(group, registry.to_config(profile)) == profile
            json.dumps(registry.to_config(profile))


@pytest.mark.parametrize(
    ("group", "config", "message"),
    [
        ("device", {"name": "pi_4", "training_macs_s": 0.0}, "must be positive"),
        ("device", {"name": "pi_4", "active_watts": 1.0}, "less than idle_watts"),
        ("device", {"name": "pi_4", "idle_watts": -1.0}, "0 or more"),
        ("device", {"name": "pi4"}, "did you mean 'pi_4'"),
        ("device", {"name": "measured"}, "needs path"),
        ("device", {"name": "measured", "path": "/nowhere/bench.json"}, "cannot read"),
        ("link", {"name": "wifi", "uplink_mbps": -2.0}, "uplink_mbps must be positive"),
        ("link", {"name": "wifi", "uplink_mbps": math.nan}, "uplink_mbps must be positive"),
        ("link", {"name": "wifi", "loss": 1.0}, "loss must be in [0, 1)"),
        ("link", {"name": "lora", "uplink_duty": 0.0}, "uplink_duty must be in (0, 1]"),
        ("link", {"name": "lora", "packet_bytes": 0}, "packet_bytes must be positive"),
        ("availability", {"name": "bernoulli", "probability": 0.0}, "(0, 1]"),
        ("availability", {"name": "diurnal", "low": 0.9, "high": 0.1}, "low no more than high"),
        ("availability", {"name": "trace", "path": "/nowhere.csv"}, "cannot read the trace"),
        ("fleet", {"name": "mixture", "devices": [], "links": []}, "one entry per kind"),
        ("fleet", {"name": "mixture", "devices": ["pi_4"], "links": []}, "one entry per kind"),
        (
            "fleet",
            {
                "name": "mixture",
                "devices": ["pi_4"] * 2,
                "links": ["wifi"] * 2,
                "shares": [0.5, 0.6],
            },
            "must sum to 1, not 1.1",
        ),
        (
            "fleet",
            {
                "name": "mixture",
                "devices": ["pi_4"] * 2,
                "links": ["wifi"] * 2,
                "shares": [2.0, -1.0],
            },
            "must be in [0, 1]",
        ),
        ("fleet", {"name": "mixture", "devices": ["pi_9"], "links": ["wifi"]}, "did you mean"),
        (
            "fleet",
            {"name": "mixture", "devices": ["pi_4"], "links": ["wifi"], "dropout": 1.0},
            "[0, 1)",
        ),
        ("pacing", {"name": "synchronous", "deadline_s": 0.0}, "positive simulated seconds"),
        ("pacing", {"name": "synchronous", "over_selection": 0.5}, "1 to 10"),
    ],
)
def test_impossible_values_are_one_clear_line(
    group: str, config: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.from_config(group, config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_measured_device_reads_the_bench(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"training_macs_s": 123456, "cores": 4}))
    device = build("device", "measured", path=str(file))
    file.unlink()
    again = registry.from_config("device", registry.to_config(device))  # as a resumed run does
    assert again.training_macs_s == device.training_macs_s == 123456
    file.write_text(json.dumps({"images_s": 3}))
    with pytest.raises(ConfigError, match="has no number training_macs_s"):
        build("device", "measured", path=str(file))


def test_shares_are_counts_and_the_seed_says_who() -> None:
    fleet = build(
        "fleet",
        "mixture",
        devices=["pi_3", "pi_4", "pi_5"],
        links=["wifi"] * 3,
        shares=[0.5, 0.3, 0.2],
    )
    for clients in (1, 2, 7, 10, 1000):
        members = [member.device.name for member in fleet.members(clients, seed=3)]
        assert len(members) == clients
        for name, share in zip(("pi_3", "pi_4", "pi_5"), (0.5, 0.3, 0.2), strict=True):
            assert abs(members.count(name) - share * clients) < 1
    assert fleet.members(100, 1) == fleet.members(100, 1) != fleet.members(100, 2)


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKS)
@given(counts=st.lists(st.integers(0, 100_000), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_more_bytes_take_longer_and_more_energy(name: str, counts: list[int], seed: int) -> None:
    link = build("link", name)
    for send in (link.down, link.up):
        sent = [send(count, seed) for count in sorted(counts)]
        for few, many in itertools.pairwise(sent):
            assert few.seconds <= many.seconds
            assert few.joules <= many.joules
            assert few.sent_bytes <= many.sent_bytes


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_faster_than_the_rate(name: str) -> None:
    link = build("link", name)
    for count in (0, 1, 222, 223, 10**5):
        up, down = link.up(count, 0), link.down(count, 0)
        assert up.seconds >= link.latency_s + 8e-6 * count / link.uplink_mbps
        assert down.seconds >= link.latency_s + 8e-6 * count / link.downlink_mbps
        assert up.sent_bytes >= count


def test_lost_packets_are_sent_again() -> None:
    """Sendings per packet are geometric, mean 1 / (1 - loss); 20,000 packets, 6 sigma."""
    loss, packets = 0.25, 20_000
    link = build("link", "wifi", loss=loss, packet_bytes=100, header_bytes=0)
    sent = link.up(100 * packets, 7).sent_bytes / 100
    sigma = math.sqrt(packets * loss) / (1 - loss)
    assert abs(sent - packets / (1 - loss)) < 6 * sigma


def test_a_short_last_packet_is_repeated_short() -> None:
    link = build("link", "wifi", loss=0.9, packet_bytes=1000, header_bytes=10)
    assert link.up(1, 0).sent_bytes % 11 == 0


# --- energy --------------------------------------------------------------------------------------


def test_energy_is_the_sum_of_what_it_went_into() -> None:
    exchange = Exchange(Transfer(2.0, 0.5, 100), 10.0, Transfer(4.0, 3.0, 50), 1.0, 5.0)
    whole = exchange.energy()
    assert exchange.seconds == 16.0
    assert (whole.training, whole.radio, whole.waiting) == (50.0, 3.5, 6.0)
    assert whole.joules == 59.5
    assert exchange.energy(1.0).joules == 0.25 + 1.0
    assert exchange.energy(7.0).joules == 0.5 + 2.0 + 25.0
    assert exchange.energy(14.0).joules == 0.5 + 2.0 + 50.0 + 1.5 + 2.0
    assert exchange.energy(0.0).joules == exchange.energy(-1.0).joules == 0.0
    spent = [exchange.energy(t).joules for t in np.linspace(0, 20, 100)]
    assert spent == sorted(spent)
    assert exchange.wire_bytes() == (50, 100)
    assert exchange.wire_bytes(1.0) == (0, 50)
    assert exchange.wire_bytes(14.0) == (25, 100)


# --- availability --------------------------------------------------------------------------------


def test_more_devices_by_night_than_by_day() -> None:
    """Means of 2,000 draws with probabilities 0.8 and 0.2: within 6 sigma = 0.054."""
    diurnal = build("availability", "diurnal")
    night = np.mean([diurnal.available(client, 0.0, 1) for client in range(2000)])
    day = np.mean([diurnal.available(client, 43_200.0, 1) for client in range(2000)])
    assert abs(night - 0.8) < 0.054
    assert abs(day - 0.2) < 0.054
    zones = build("availability", "diurnal", zones=24)
    mixed = np.mean([zones.available(client, 0.0, 1) for client in range(2000)])
    assert abs(mixed - 0.5) < 0.067


def test_a_trace_repeats(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("client,start_s,end_s\n7,0,10\n9,50,60\n7,90,100\n")
    trace = build("availability", "trace", path=str(file), period_s=100.0)
    for client, seconds, there in [(0, 5, 1), (0, 15, 0), (0, 95, 1), (1, 55, 1), (1, 155, 1)]:
        assert trace.available(client, float(seconds), 0) is bool(there)
    assert trace.available(2, 305.0, 0)  # of three clients the third is as the first
    file = tmp_path / "bad.csv"
    file.write_text("client,start_s,end_s\n7,10,0\n")
    with pytest.raises(ConfigError, match="is no trace"):
        build("availability", "trace", path=str(file))


def test_a_round_waits_until_somebody_is_there(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("client,start_s,end_s\n0,3600,7200\n1,0,6\n")
    fleet = mixture(availability={"name": "trace", "path": str(file)})
    fedq = strategy(fleet, clients=2)
    grid = InlineGrid(constant_client(LAYOUT), 2)
    state, first = fedq.run_round(grid, fedq.initial(ZERO))
    state, second = fedq.run_round(grid, dataclasses.replace(state, now_s=6.0))
    assert first.sampled == second.sampled == 1
    assert 5.1 < first.simulated_seconds < 5.2  # type: ignore[operator]
    assert 3600 < state.now_s < 3605


def test_a_run_ends_if_nobody_comes(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("client,start_s,end_s\n0,0,6\n")
    fleet = mixture(availability={"name": "trace", "path": str(file), "period_s": 1e9})
    fedq = strategy(fleet, clients=1)
    grid = InlineGrid(constant_client(LAYOUT), 1)
    state, _ = fedq.run_round(grid, fedq.initial(ZERO))
    state = dataclasses.replace(state, now_s=10.0)
    with pytest.raises(FedqError, match="no client was available for 30 simulated days"):
        fedq.run_round(grid, state)


# --- rounds --------------------------------------------------------------------------------------

MACS = [1e9 * (1 + place) for place in range(12)]


def mixture(**options: object) -> object:
    kinds = {"devices": ["pi_4", "pi_zero_2_w"], "links": ["wifi", "lte_m"], **options}
    return registry.from_config("fleet", {"name": "mixture", **kinds})


def strategy(fleet: object, clients: int = 12, **options: object) -> FedQ:
    clock = Clock(fleet, 0, MACS[:clients])  # type: ignore[arg-type]
    chosen = {"layout": LAYOUT, "codec": Identity(), "clock": clock, **options}
    return FedQ(**chosen)  # type: ignore[arg-type]


def run(
    fedq: FedQ,
    clients: int = 12,
    rounds: int = 2,
    handler: Handler | None = None,
    order: Callable[[list[Message]], list[Message]] = list,
) -> tuple[ServerState, list[RoundReport], InlineGrid]:
    grid = InlineGrid(handler or constant_client(LAYOUT), clients, order)
    state, reports = fedq.initial(ZERO), []
    for _ in range(rounds):
        state, report = fedq.run_round(grid, state)
        reports.append(report)
    return state, reports, grid


def physics(report: RoundReport) -> tuple[object, ...]:
    return (
        report.simulated_seconds,
        report.joules,
        report.joules_by_use,
        report.wire_uplink_bytes,
        report.wire_downlink_bytes,
        dict(report.rejected),
        report.uplink_bytes,
        report.replies,
    )


def test_a_fleet_changes_no_model_and_adds_its_time() -> None:
    plain, without, _ = run(FedQ(layout=LAYOUT, codec=Identity()))
    timed, reports, _ = run(strategy(mixture(straggler_sigma=0.5)))
    np.testing.assert_array_equal(plain.weights, timed.weights)
    assert without[0].simulated_seconds is None
    assert timed.now_s == sum(report.simulated_seconds or 0 for report in reports) > 0
    for report in reports:
        assert report.joules_by_use is not None
        assert report.joules == pytest.approx(sum(report.joules_by_use.values()), rel=1e-12)
        assert report.wire_uplink_bytes is not None
        assert report.wire_uplink_bytes > report.uplink_bytes  # headers, repetitions


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    fedq = strategy(mixture())
    _, (report, *_), grid = run(fedq)
    clock = fedq.clock
    assert clock is not None
    whole = [
        clock.exchange(
            message.metadata.dst_node_id - 2,
            1,
            down_bytes=report.downlink_bytes // 12,
            up_bytes=len(_reply(message)),
        )
        for message in grid.seen[:12]
    ]
    assert report.simulated_seconds == pytest.approx(max(e.seconds for e in whole), rel=1e-12)
    assert report.joules == pytest.approx(sum(e.energy().joules for e in whole), rel=1e-12)


def _reply(message: Message) -> bytes:
    from fedq.records import unpack

    place = message.metadata.dst_node_id - 2
    return unpack(constant_client(LAYOUT)(message, place).content)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"deadline_s": 6.0},
        {"over_selection": 1.5},
        {"over_selection": 1.5, "deadline_s": 4.0},
    ],
)
def test_the_order_of_work_changes_nothing(options: dict[str, object]) -> None:
    fleet = mixture(straggler_sigma=0.4, dropout=0.1)
    pacing = build("pacing", "synchronous", **options)
    found = []
    for order in (list, lambda messages: messages[::-1]):
        fedq = strategy(fleet, clients_per_round=6, pacing=pacing, quorum=0.1)
        state, reports, _ = run(fedq, rounds=4, order=order)
        found.append((state.weights.tobytes(), state.now_s, [*map(physics, reports)]))
    assert found[0] == found[1]


def test_who_is_late_is_lost_and_stops() -> None:
    fleet = mixture()
    _, (free, *_), _ = run(strategy(fleet), rounds=1)
    pacing = build("pacing", "synchronous", deadline_s=8.0)
    _, (report, *_), grid = run(strategy(fleet, pacing=pacing, quorum=0.1), rounds=1)
    assert free.simulated_seconds is not None and free.simulated_seconds > 8  # noqa: PT018
    assert report.simulated_seconds == 8.0
    assert report.rejected["late"] == 12 - report.replies > 0
    assert report.joules is not None and free.joules is not None  # noqa: PT018
    assert report.joules < free.joules
    assert len(grid.seen) < 12  # who has not even trained by then is not run


def test_the_first_of_a_larger_cohort_count() -> None:
    fleet = mixture(straggler_sigma=0.5)
    pacing = build("pacing", "synchronous", over_selection=1.5)
    fedq = strategy(fleet, clients_per_round=6, pacing=pacing)
    _, reports, grid = run(fedq, rounds=5)
    _, everybody, _ = run(strategy(fleet, clients_per_round=9), rounds=5)
    for report, waits in zip(reports, everybody, strict=True):
        assert (report.sampled, report.replies, report.rejected["surplus"]) == (9, 6, 3)
        assert report.simulated_seconds < waits.simulated_seconds  # type: ignore[operator]
    assert 5 * 6 <= len(grid.seen) < 5 * 9


def test_the_dead_cost_energy_and_no_round() -> None:
    fedq = strategy(mixture(dropout=0.5), quorum=0.1)
    _, reports, grid = run(fedq, rounds=6)
    dropped = sum(report.rejected["dropout"] for report in reports)
    assert dropped == 6 * 12 - sum(report.replies for report in reports)
    assert len(grid.seen) == 72 - dropped
    assert 10 < dropped < 62  # 72 fair coins: outside with probability below 1e-9
    assert all(report.joules for report in reports)


def test_devices_that_leave_lose_their_update() -> None:
    fleet = mixture(availability={"name": "bernoulli", "probability": 0.7, "slot_s": 2.0})
    _, reports, _ = run(strategy(fleet, quorum=0.01), rounds=6)
    assert sum(report.rejected["away"] for report in reports) > 0
    assert all(report.sampled <= 12 for report in reports)


def test_a_client_that_fails_still_takes_time() -> None:
    def handle(message: Message, partition: int) -> Message:
        return Task.open(message, LAYOUT).drop("no data today")

    _, (report,), _ = run(strategy(mixture()), rounds=1, handler=handle)
    assert report.skipped
    assert report.simulated_seconds is not None and report.simulated_seconds > 0  # noqa: PT018


def test_second_answers_and_strangers_take_no_time() -> None:
    class Noisy(InlineGrid):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterator[Message]:
            stranger = Message(RecordDict(), 99, "train")
            yield Message(RecordDict(), reply_to=stranger)
            for reply in super().send_and_receive(messages):
                yield reply
                yield reply

    fedq = strategy(mixture())
    grid = Noisy(constant_client(LAYOUT), 12)
    _, report = fedq.run_round(grid, fedq.initial(ZERO))
    _, (quiet, *_), _ = run(strategy(mixture()), rounds=1)
    assert physics(report) == physics(quiet)


def test_flights_that_must_have_trained_are_run() -> None:
    """The rule that decides whom to run: by bounds, the ones that are lacking; then one by one."""

    class Toy(Flight):
        def __init__(self, place: int, end_s: float, *, here: bool) -> None:
            self.place, self.end_s, self.here = place, end_s, here

        @property
        def awaited(self) -> bool:
            return not self.here

        @property
        def arrived(self) -> bool:
            return self.here

    flights = [Toy(i, end_s, here=False) for i, end_s in enumerate([5.0, 1.0, 3.0, 2.0])]
    assert nth_arrival(flights, 2) == 2.0
    assert [flight.place for flight in certain(flights, 2, 2.0)] == [1, 3]
    flights[1].here = flights[3].here = True
    flights[3].end_s = 4.0  # its reply takes long: the third may be earlier, the first cannot
    assert nth_arrival(flights, 2) == 3.0
    assert [flight.place for flight in certain(flights, 2, 3.0)] == [2]
