"""The guard: what is out of proportion is refused, and whoever keeps sending such is not asked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedq import ConfigError, Layout, build
from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.engines.stream import StreamGrid
from fedq.errors import FedqError
from fedq.guard import HOSTILE, MEMORY, Guard, GuardState, RejectedError, Size, Watch
from fedq.records import UNREADABLE
from fedq.strategy import FedQ
from tests.grids import InlineGrid, constant_client, raw_reply

# isort: split
from flwr.app import Error, Message

D = 8
ONES, NONE = np.ones(D, np.float32), np.zeros(0, np.float32)
LAYOUT = Layout.flat(D)


def after(guard: Guard, state: GuardState, norms: list[float], number: int = 1) -> GuardState:
    """The state after a round of updates with these norms, whatever becomes of them."""
    watch = guard.watch(state, number, ONES)
    for norm in norms:
        admit(watch, norm)
    return watch.after()


def admit(watch: Watch, norm: float) -> str | None:
    """What an update of a norm is rejected as."""
    try:
        watch.admit(ONES * np.float32(norm / math.sqrt(D)), NONE)
    except RejectedError as error:
        return error.kind
    return None


def test_sizes_are_measured_in_float64() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-30, 1.0, 1.6e4):
        x = (rng.normal(size=1000) * scale).astype(np.float32)
        size = Size.of(x, -x)
        assert size.norm == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-12)
        assert size.peak == size.state == np.abs(x).max()
    assert Size.of(NONE, NONE) == Size(0.0, 0.0, 0.0)


def test_before_the_first_round_the_model_is_the_yardstick() -> None:
    guard = Guard(norm_limit=3.0, peak_limit=None)
    model = ONES * np.float32(2)
    watch = guard.watch(GuardState(), 1, model)
    norm = float(np.linalg.norm(model))
    assert [admit(watch, c * norm) for c in (0.0, 1.0, 2.99, 3.01, 1e6)] == [None] * 3 + [
        "norm"
    ] * 2
    unlimited = guard.watch(GuardState(), 1, 0 * model)
    assert admit(unlimited, 1e6) is None


def test_later_it_is_the_cohort_s_median() -> None:
    guard = Guard(norm_limit=3.0)
    state = after(guard, GuardState(), [0.1, 1.0, 1.2, 1.3, 1.4])
    watch = guard.watch(state, 2, ONES)
    assert admit(watch, 3.5) is None
    assert admit(watch, 3.7) == "norm"


def test_a_minority_does_not_move_the_yardstick() -> None:
    guard = Guard(norm_limit=3.0, peak_limit=None)
    honest = [0.9, 1.0, 1.1, 1.05]
    state = GuardState()
    for number in range(1, 6):
        state = after(guard, state, [*honest, 1e5, 1e5, 1e5], number)
    assert state.medians[-1].norm < 1.11
    assert len(state.medians) == MEMORY


def test_a_jump_of_all_is_followed_before_patience_ends() -> None:
    guard, state = Guard(norm_limit=3.0), GuardState()
    for number in range(1, 4):
        state = after(guard, state, [1.0] * 5, number)
    refused = 0
    for number in range(4, 8):
        watch = guard.watch(state, number, ONES)
        refused += admit(watch, 100.0) is not None
        state = after(guard, state, [100.0] * 5, number)
    assert refused == 2


def test_an_inflated_scale_shows_in_the_peak() -> None:
    guard = Guard(norm_limit=None, peak_limit=10.0)
    state = guard.watch(GuardState(), 1, ONES)
    state.admit(ONES, ONES)
    watch = guard.watch(state.after(), 2, ONES)
    spike = np.zeros(D, np.float32)
    for value, state_peak, kind in ((9, 9, None), (-11, 0, "peak"), (1, 11, "peak")):
        spike[3] = value
        try:
            watch.admit(spike, np.full(D, state_peak, np.float32))
            found = None
        except RejectedError as error:
            found = error.kind
        assert found == kind


def test_clipping_keeps_the_direction() -> None:
    guard = Guard(norm_clip=2.0)
    watch = guard.watch(GuardState(), 1, ONES)
    unit = math.sqrt(D)
    short, long = ONES, ONES * np.float32(5)
    assert watch.admit(short, NONE) is short
    clipped = watch.admit(long, NONE)
    assert np.linalg.norm(clipped) == pytest.approx(2 * unit, rel=1e-6)
    assert np.ptp(clipped) == 0


def test_quarantine_follows_three_strikes_and_ends() -> None:
    guard, state = Guard(strikes=3, quarantine_rounds=4), GuardState()

    def round_of(number: int, kind: str | None) -> GuardState:
        watch = guard.watch(state, number, ONES)
        watch.note(7, kind)
        watch.note(8)
        return watch.after()

    for number in (1, 2, 3):
        assert not guard.watch(state, number, ONES).barred
        state = round_of(number, "malformed")
    for number in (4, 5, 6, 7):
        watch = guard.watch(state, number, ONES)
        assert watch.barred == {7}
        state = watch.after()
    assert not guard.watch(state, 8, ONES).barred
    again = round_of(8, "norm")  # one more, and it is back
    assert guard.watch(again, 9, ONES).barred == {7}
    state = round_of(8, None)  # well-behaved: forgiven
    assert state.strikes == {}


def test_bad_luck_is_no_strike_and_never_is_never() -> None:
    for kind in ("error", "dropped", "no base", "no reply"):
        assert kind not in HOSTILE
        watch = Guard(strikes=1).watch(GuardState(), 1, ONES)
        watch.note(7, kind)
        assert watch.after() == GuardState()
    watch = Guard(strikes=0).watch(GuardState(), 1, ONES)
    watch.note(7, "seed")
    assert not watch.after().barred


def test_the_worst_reply_of_a_round_decides_in_any_order() -> None:
    for kinds in ((None, "unexpected"), ("unexpected", None)):
        watch = Guard().watch(GuardState(), 1, ONES)
        for kind in kinds:
            watch.note(7, kind)
        assert watch.after().strikes == {7: 1}


@settings(max_examples=50, deadline=None)
@given(
    medians=st.lists(st.tuples(*[st.floats(0, 1e30)] * 3), max_size=3),
    numbers=st.dictionaries(st.integers(0, 2**64 - 1), st.integers(0, 1000), max_size=4),
)
def test_its_memory_is_plain_data(medians: list[Any], numbers: dict[int, int]) -> None:
    state = GuardState(tuple(Size(*m) for m in medians), numbers, numbers, numbers)
    assert GuardState.from_meta(json.loads(json.dumps(state.to_meta()))) == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_limit": 0.0}, "guard.norm_limit must be positive"),
        ({"peak_limit": -1.0}, "guard.peak_limit must be positive"),
        ({"norm_clip": math.nan}, "guard.norm_clip must be positive"),
        ({"strikes": -1}, "guard.strikes"),
        ({"quarantine_rounds": 0}, "guard.quarantine_rounds"),
    ],
)
def test_options_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("guard", "relative", **options)


# --- in a round ----------------------------------------------------------------------------------


def strategy(**options: Any) -> FedQ:
    return FedQ(layout=LAYOUT, codec=Identity(), **options)


def test_an_update_out_of_proportion_loses_itself_and_its_sender_is_quarantined() -> None:
    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        delta = ONES * np.float32(1000 if partition == 2 else 1)
        return task.reply(delta, examples=1, client=partition)

    grid, fedq = InlineGrid(handle, 6), strategy(guard=Guard(strikes=2, quarantine_rounds=3))
    state = fedq.initial(ONES)
    seen = []
    for _ in range(7):
        state, report = fedq.run_round(grid, state)
        seen.append((report.sampled, report.rejected["norm"], report.quarantined))
        assert report.replies == 5
    assert seen == [(6, 1, 0), (6, 1, 0), *[(5, 0, 1)] * 3, (6, 1, 0), (5, 0, 1)]
    assert np.array_equal(state.weights, ONES * np.float32(8))


def test_a_client_that_sends_garbage_is_not_asked_again() -> None:
    honest = constant_client(LAYOUT)

    def handle(message: Message, partition: int) -> Message:
        return raw_reply(message, b"fq" * 50) if partition == 0 else honest(message, partition)

    grid, fedq = InlineGrid(handle, 4), strategy()
    state = fedq.initial(ONES)
    for _ in range(6):
        state, report = fedq.run_round(grid, state)
    asked = [message.metadata.dst_node_id for message in grid.seen]
    assert asked.count(2) == 3
    assert report.quarantined == 1
    assert not report.rejected


def test_when_all_are_quarantined_the_run_says_so() -> None:
    grid = InlineGrid(lambda message, partition: raw_reply(message, b""), 2)
    fedq = strategy(guard=Guard(strikes=1))
    state, _ = fedq.run_round(grid, fedq.initial(ONES))
    with pytest.raises(FedqError, match="in quarantine"):
        fedq.run_round(grid, state)


def test_a_claim_never_grows_beyond_the_registered_one() -> None:
    claims = {0: [3, 1, 900], 1: [1, 1, 1]}

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        count = claims[partition][task.round - 1]
        return task.reply(ONES * np.float32(partition), examples=count, client=partition)

    grid, fedq = InlineGrid(handle, 2), strategy(weighting="registered")
    state, means = fedq.initial(0 * ONES), []
    for _ in range(3):
        before = state.weights
        state, _ = fedq.run_round(grid, state)
        means.append(float((state.weights - before)[0]))
    assert means == pytest.approx([1 / 4, 1 / 2, 1 / 4])
    assert state.guard.registered == {0: 3, 1: 1}


def test_what_is_longer_than_any_reply_is_not_opened() -> None:
    honest = constant_client(LAYOUT)

    def handle(message: Message, partition: int) -> Message:
        return raw_reply(message, bytes(1 << 20)) if partition else honest(message, partition)

    _, report = strategy().run_round(InlineGrid(handle, 2), strategy().initial(ONES))
    assert report.rejected == {"malformed": 1}
    assert "a reply has at most" in report.reasons[0]


# --- Flower's records ----------------------------------------------------------------------------


class Mailbox(InlineGrid):
    """A grid whose replies are pulled; those of some nodes cannot be built."""

    broken: Callable[[], object]

    def push_messages(self, messages: Any) -> list[str]:
        self.box = {str(m.metadata.dst_node_id): m for m in messages}
        return list(self.box)

    def pull_messages(self, message_ids: Any) -> Iterator[Message]:
        for identifier in message_ids:
            if identifier == "3":
                self.broken()
            yield self.handler(self.box[identifier], int(identifier) - 2)


@pytest.mark.parametrize("error", [MemoryError, ValueError, KeyError, TypeError])
def test_records_that_cannot_be_built_cost_their_sender_s_update(error: type[Exception]) -> None:
    def broken() -> None:
        raise error("no such chunk")

    grid = Mailbox(constant_client(LAYOUT), 3)
    grid.broken = broken
    fedq = strategy()
    after, report = fedq.run_round(StreamGrid(grid), fedq.initial(0 * ONES))
    assert report.rejected == {"malformed": 1}
    assert "cannot be built" in report.reasons[0]
    np.testing.assert_allclose(after.weights, (1 + 9) / 4, rtol=1e-6)


def test_a_lost_connection_is_not_a_client_s_fault() -> None:
    def broken() -> None:
        raise ConnectionError("server is gone")

    grid = Mailbox(constant_client(LAYOUT), 3)
    grid.broken = broken
    fedq = strategy()
    with pytest.raises(ConnectionError):
        fedq.run_round(StreamGrid(grid), fedq.initial(0 * ONES))


def test_a_client_may_not_pass_for_unreadable_without_harm() -> None:
    def handle(message: Message, partition: int) -> Message:
        return Message(Error(UNREADABLE, "me"), reply_to=message)

    fedq = strategy(guard=Guard(strikes=1))
    state, report = fedq.run_round(InlineGrid(handle, 2), fedq.initial(ONES))
    assert report.rejected == {"malformed": 2}
    assert set(state.guard.barred) == {2, 3}


_BOMB = """
import json
from pathlib import Path
from fedq.guard import limit_memory
from flwr.app import Array
from flwr.supercore.inflatable import inflatable_object as io
chunk = Array("uint8", (1 << 20,), "fedq.blob", bytes(1 << 20))
head = json.loads(io.get_object_body(chunk.deflate(), Array))
head["arraychunk_ids"] = [0] * 4000  # a megabyte, named four thousand times
bomb = io.add_header_to_object_body(json.dumps(head).encode(), chunk)
children = dict(chunk.children)
limit_memory(1.0)
try:
    Array.inflate(bomb, children)
    print("inflated")
except MemoryError:
    print("refused")
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # of this program alone
print(int(peak) < 1.2e6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_a_bomb_does_not_outgrow_the_server_s_limit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BOMB], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["refused", "True"]
