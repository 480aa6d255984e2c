"""The strategy: exact means in any order, one bad client loses its own update only."""

from __future__ import annotations

import dataclasses
import json
import zlib

import numpy as np
import pytest

from fedq import Layout, build, wire
from fedq.client import Task
from fedq.codecs.base import Codec
from fedq.codecs.identity import Identity
from fedq.errors import ConfigError, DecodeError, FedqError
from fedq.random import round_seed
from fedq.records import unpack
from fedq.strategy import PATIENCE, FedQ
from tests.grids import Handler, InlineGrid, constant_client, envelope, raw_reply

# isort: split
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord

LAYOUT = Layout(("a", "b"), ((2, 3), (1,)))
ZERO = np.zeros(LAYOUT.size, np.float32)


def strategy(**options: object) -> FedQ:
    return FedQ(layout=LAYOUT, **{"codec": Identity(), **options})  # type: ignore[arg-type]


def test_mean_is_weighted_by_examples() -> None:
    grid = InlineGrid(constant_client(LAYOUT), 3)
    fedq = strategy()
    after, report = fedq.run_round(grid, fedq.initial(ZERO))
    expected = (1 * 1 + 2 * 2 + 3 * 3) / 6
    np.testing.assert_allclose(after.weights, expected, rtol=1e-6)
    assert (report.replies, report.sampled, report.rejected.total()) == (3, 3, 0)
    assert report.train_loss == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)


def test_uniform_weighting_and_clamped_claims() -> None:
    grid = InlineGrid(constant_client(LAYOUT), 3)
    uniform = strategy(weighting="uniform")
    after, _ = uniform.run_round(grid, uniform.initial(ZERO))
    np.testing.assert_allclose(after.weights, 2, rtol=1e-6)
    clamped = strategy(max_examples=1)
    again, _ = clamped.run_round(grid, clamped.initial(ZERO))
    np.testing.assert_array_equal(again.weights, after.weights)


@pytest.mark.parametrize("aggregator", ["mean", "median", "trimmed_mean"])
def test_order_of_replies_does_not_matter(aggregator: str) -> None:
    rng = np.random.default_rng(0)
    scales = 10.0 ** rng.integers(-6, 3, (9, 1))
    deltas = (rng.normal(size=(9, LAYOUT.size)) * scales).astype(np.float32)

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        return task.reply(deltas[partition], examples=partition + 1, client=partition)

    results = []
    for order in (list, lambda m: m[::-1], lambda m: m[4:] + m[:4]):
        fedq = strategy(aggregator=build("aggregator", aggregator))
        after, _ = fedq.run_round(InlineGrid(handle, 9, order), fedq.initial(ZERO))
        results.append(after.weights.tobytes())
    assert len(set(results)) == 1


def test_what_is_different_in_a_round_goes_out_with_it() -> None:
    fedq = strategy(task={"training": 0, "model": "m"}, schedule=lambda r: {"training": 10 * r})
    state = dataclasses.replace(fedq.initial(ZERO), round=2)
    asked = fedq.request(state)
    assert (asked["training"], asked["model"], asked["round"]) == (30, "m", 3)


def _hostile(kind: str, message: Message, good: Message) -> Message:
    blob = unpack(good.content)
    parts = wire.unseal(blob).parts
    meta = {"round": int(message.metadata.group_id), "client": 1, "examples": 5}
    seed = Identity().client_seed(round_seed(0, meta["round"]), 1)
    if kind == "garbage":
        return raw_reply(message, b"\x00" * 100)
    if kind == "empty":
        return raw_reply(message, b"")
    if kind == "flipped bit":
        return raw_reply(message, blob[:30] + bytes([blob[30] ^ 1]) + blob[31:])
    if kind == "stale":
        return raw_reply(message, envelope({**meta, "round": 99}, *map(bytes, parts)))
    if kind == "no examples":
        return raw_reply(message, envelope({**meta, "examples": 0}, *map(bytes, parts)))
    if kind == "text examples":
        return raw_reply(message, envelope({**meta, "examples": "9"}, *map(bytes, parts)))
    if kind == "text loss":
        return raw_reply(message, envelope({**meta, "loss": "low"}, *map(bytes, parts)))
    if kind == "endless loss":
        return raw_reply(message, envelope({**meta, "loss": 10**400}, *map(bytes, parts)))
    if kind == "great loss":
        return raw_reply(message, envelope({**meta, "loss": 1e304}, *map(bytes, parts)))
    if kind == "infinite loss":
        sealed = envelope({**meta, "loss": 1234.5}, *map(bytes, parts))
        content = sealed[7:].replace(b"1234.5", b"1e9999")
        crc = zlib.crc32(content, zlib.crc32(sealed[:3]))
        return raw_reply(message, sealed[:3] + crc.to_bytes(4, "little") + content)
    if kind == "one part":
        return raw_reply(message, envelope(meta, bytes(parts[0])))
    if kind == "other layout":
        other = Identity().encode(np.zeros(9, np.float32), Layout.flat(9))
        return raw_reply(message, envelope(meta, other, bytes(parts[1])))
    if kind == "other codec":
        other = build("codec", "uniform", bits=4).encode(ZERO, LAYOUT)
        return raw_reply(message, envelope(meta, other, bytes(parts[1])))
    if kind == "not a number":
        body = np.full(LAYOUT.size, np.nan, "<f4").tobytes()
        bad = wire.seal_frame(Identity(), LAYOUT, seed, body)
        return raw_reply(message, envelope(meta, bad, bytes(parts[1])))
    if kind == "huge":
        bad = Identity().encode(np.full(LAYOUT.size, 1e30, np.float32), LAYOUT, seed)
        return raw_reply(message, envelope(meta, bad, bytes(parts[1])))
    if kind == "no client":
        return raw_reply(message, envelope({**meta, "client": None}, *map(bytes, parts)))
    if kind == "negative client":
        return raw_reply(message, envelope({**meta, "client": -1}, *map(bytes, parts)))
    if kind == "true client":
        return raw_reply(message, envelope({**meta, "client": True}, *map(bytes, parts)))
    if kind == "endless client":
        return raw_reply(message, envelope({**meta, "client": 2**64}, *map(bytes, parts)))
    if kind == "other seed":
        other = Identity().encode(ZERO, LAYOUT, seed + 1)
        return raw_reply(message, envelope(meta, other, bytes(parts[1])))
    if kind == "seed of another client":
        return raw_reply(message, envelope({**meta, "client": 7}, *map(bytes, parts)))
    if kind == "seed of another round":
        other = Identity().encode(ZERO, LAYOUT, Identity().client_seed(round_seed(0, 2), 1))
        return raw_reply(message, envelope(meta, other, bytes(parts[1])))
    if kind in ("no such variant", "true variant"):
        said = {"no such variant": 1, "true variant": True}[kind]
        return raw_reply(message, envelope({**meta, "variant": said}, *map(bytes, parts)))
    if kind == "dropped":
        return raw_reply(message, envelope({"round": meta["round"], "dropped": "loss is NaN"}))
    if kind == "error":
        return Message(Error(2, "no memory"), reply_to=message)
    raise AssertionError(kind)


KINDS = {
    "garbage": "malformed",
    "empty": "malformed",
    "flipped bit": "malformed",
    "stale": "stale",
    "no examples": "malformed",
    "text examples": "malformed",
    "text loss": "malformed",
    "endless loss": "malformed",
    "great loss": "malformed",
    "infinite loss": "malformed",
    "one part": "malformed",
    "other layout": "malformed",
    "other codec": "malformed",
    "not a number": "malformed",
    "huge": "out of range",
    "no client": "malformed",
    "negative client": "malformed",
    "true client": "malformed",
    "endless client": "malformed",
    "other seed": "seed",
    "seed of another client": "seed",
    "seed of another round": "seed",
    "no such variant": "malformed",
    "true variant": "malformed",
    "dropped": "dropped",
    "error": "error",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_client_loses_its_own_update_only(kind: str) -> None:
    honest = constant_client(LAYOUT)

    def handle(message: Message, partition: int) -> Message:
        good = honest(message, partition)
        return _hostile(kind, message, good) if partition == 1 else good

    fedq = strategy()
    after, report = fedq.run_round(InlineGrid(handle, 4), fedq.initial(ZERO))
    np.testing.assert_allclose(after.weights, (1 + 9 + 16) / 8, rtol=1e-6)
    assert report.rejected == {KINDS[kind]: 1}
    assert report.replies == 3
    assert report.reasons[0].startswith(KINDS[kind])


def test_a_client_cannot_choose_a_wider_code() -> None:
    asked, sent = (build("codec", "uniform", bits=bits) for bits in (4, 16))

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        if partition == 0:
            task = dataclasses.replace(task, codec=sent)
        return task.reply(np.ones(LAYOUT.size, np.float32), examples=1, client=partition)

    fedq = strategy(codec=asked)
    _, report = fedq.run_round(InlineGrid(handle, 3), fedq.initial(ZERO))
    assert report.rejected == {"malformed": 1}
    assert "where" in report.reasons[0]


def numbered(numbers: list[list[int]]) -> Handler:
    """In round r, partition p answers as client ``numbers[r - 1][p]``."""

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        return task.reply(ZERO, examples=1, client=numbers[task.round - 1][partition])

    return handle


@pytest.mark.parametrize(
    ("second", "rejected"),
    [
        ([4, 5, 6], 0),
        ([4, 5, 9], 1),  # a number of its own, but not the first
        ([4, 5, 5], 1),  # another's, which answers first
        ([5, 5, 6], 1),  # another's, which answers later
        ([5, 4, 6], 2),
    ],
)
def test_a_node_keeps_its_client_number(second: list[int], rejected: int) -> None:
    fedq = strategy(quorum=0.1)
    grid = InlineGrid(numbered([[4, 5, 6], second, [4, 5, 6]]), 3)
    state = fedq.initial(ZERO)
    for lost in (0, rejected, 0):
        state, report = fedq.run_round(grid, state)
        assert report.rejected.total() == report.rejected["seed"] == lost
    assert state.clients == {2: 4, 3: 5, 4: 6}


def test_two_nodes_cannot_be_one_client() -> None:
    fedq = strategy(quorum=0.1)
    state, report = fedq.run_round(InlineGrid(numbered([[0, 0, 0]]), 3), fedq.initial(ZERO))
    assert report.rejected == {"seed": 2}
    assert "number clients apart" in report.reasons[0]
    assert state.clients == {2: 0}


def test_a_device_that_comes_back_as_another_node_keeps_its_number() -> None:
    fedq = strategy()
    state = dataclasses.replace(fedq.initial(ZERO), clients={77: 0, 2: 1})  # 77 is not connected
    state, report = fedq.run_round(InlineGrid(numbered([[1, 0]]), 2), state)
    assert not report.rejected
    assert state.clients == {2: 1, 3: 0}


def test_a_client_s_number_is_checked_before_it_is_sent() -> None:
    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        for number in (-1, 2**64):
            with pytest.raises(ConfigError, match="client must be a number"):
                task.reply(ZERO, examples=1, client=number)
        return task.reply(ZERO, examples=1, client=np.int64(3))  # type: ignore[arg-type]

    fedq = strategy()
    state, _ = fedq.run_round(InlineGrid(handle, 1), fedq.initial(ZERO))
    assert state.clients == {2: 3}


def test_what_a_peer_says_is_fit_for_a_terminal() -> None:
    def handle(message: Message, partition: int) -> Message:
        return Message(Error(2, "first\nsecond\x1b[31m\ttab" + "x" * 999), reply_to=message)

    fedq = strategy()
    _, report = fedq.run_round(InlineGrid(handle, 1), fedq.initial(ZERO))
    assert report.reasons[0].isprintable()
    assert report.reasons[0].startswith("error: first second")
    assert len(report.reasons[0]) <= 200


def test_a_robust_rule_covers_the_state() -> None:
    state_layout = Layout.flat(2)

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT, state_layout)
        value = 16000.0 if partition == 4 else 1.0 + partition
        state = np.full(2, value, np.float32)
        return task.reply(ZERO, examples=1, client=partition, state=state)

    fedq = strategy(aggregator=build("aggregator", "median"), state_layout=state_layout)
    after, _ = fedq.run_round(InlineGrid(handle, 9), fedq.initial(ZERO))
    assert 1 <= after.state[0] <= 9


STATE = Layout(("lo", "scale"), ((1,), (2,)))


@pytest.mark.parametrize("aggregator", ["mean", "median"])
def test_every_variant_has_its_state_and_every_entry_its_rule(aggregator: str) -> None:
    """Clients 0 to 2 are of the first variant, 3 of the second, none of the third."""
    states = np.array([[1, 1, 4], [2, 4, 4], [3, 16, 4], [9, -2, 0]], np.float32)

    def handle(message: Message, partition: int) -> Message:
        opened = wire.unseal(unpack(message.content))
        variant = partition // 3
        task = Task._of(message, opened, LAYOUT, STATE, None, None, "abc", variant)
        assert np.array_equal(task.state, start[3 * variant : 3 * variant + 3])
        return task.reply(ZERO, examples=1, client=partition, state=states[partition])

    start = np.arange(9, dtype=np.float32)
    fedq = strategy(
        state_layout=STATE,
        merge_rules=("mean", "log_mean"),
        variants="abc",
        aggregator=build("aggregator", aggregator),
    )
    after, report = fedq.run_round(InlineGrid(handle, 4), fedq.initial(ZERO, start))
    assert report.rejected == {}
    expected = [2, 4, 4, 9, 2, 0, *start[6:]]
    np.testing.assert_allclose(after.state, expected, rtol=1e-6)


def test_merge_rules_fit_the_state() -> None:
    with pytest.raises(ConfigError, match="merge rule for each of 2"):
        strategy(state_layout=STATE, merge_rules=("mean",))
    with pytest.raises(ConfigError, match="log_mean"):
        strategy(state_layout=STATE, merge_rules=("mean", "logmean"))


def test_bytes_of_lost_replies_are_counted() -> None:
    honest = constant_client(LAYOUT)
    sent = []

    def handle(message: Message, partition: int) -> Message:
        reply = _hostile("stale", message, honest(message, partition))
        sent.append(len(unpack(reply.content)))
        return reply if partition else honest(message, partition)

    fedq = strategy(quorum=0.1)
    _, report = fedq.run_round(InlineGrid(handle, 3), fedq.initial(ZERO))
    assert (report.received, report.replies) == (3, 1)
    assert report.uplink_bytes > sum(sent[1:])
    assert report.float32_uplink_bytes < report.uplink_bytes


def test_a_second_answer_and_a_stranger_do_not_count() -> None:
    honest = constant_client(LAYOUT)

    class Twice(InlineGrid):
        def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
            for reply in super().send_and_receive(messages):
                yield reply
                yield reply

    fedq = strategy()
    after, report = fedq.run_round(Twice(honest, 2), fedq.initial(ZERO))
    np.testing.assert_allclose(after.weights, 5 / 3, rtol=1e-6)
    assert report.rejected == {"unexpected": 2}


def test_without_a_quorum_nothing_changes_and_patience_ends() -> None:
    honest = constant_client(LAYOUT)

    def handle(message: Message, partition: int) -> Message:
        if partition:
            return Message(Error(2, "battery is empty"), reply_to=message)
        return honest(message, partition)

    fedq = strategy(quorum=0.75)
    grid, state = InlineGrid(handle, 4), fedq.initial(ZERO)
    for _ in range(PATIENCE - 1):
        before = state
        state, report = fedq.run_round(grid, state)
        assert report.skipped
        assert state.weights is before.weights
    with pytest.raises(FedqError, match="battery is empty"):
        fedq.run_round(grid, state)


def test_missing_replies_are_counted() -> None:
    class Silent(InlineGrid):
        def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
            assert timeout == 7.0
            return list(super().send_and_receive(messages))[:2]

    fedq = strategy(deadline_s=7.0)
    _, report = fedq.run_round(Silent(constant_client(LAYOUT), 4), fedq.initial(ZERO))
    assert report.rejected == {"no reply": 2}


def test_no_client_is_a_clear_error() -> None:
    fedq = strategy()
    with pytest.raises(ConfigError, match="no client is connected"):
        fedq.run_round(InlineGrid(constant_client(LAYOUT), 0), fedq.initial(ZERO))


@pytest.mark.parametrize(("wanted", "count"), [(3, 3), (0.5, 5), (0.01, 1), (99, 10), (1.0, 10)])
def test_sampling_is_seeded_and_has_the_right_size(wanted: float, count: int) -> None:
    grid = InlineGrid(constant_client(LAYOUT), 10)
    first = [strategy(clients_per_round=wanted, seed=1).sample(grid, r) for r in range(20)]
    again = [strategy(clients_per_round=wanted, seed=1).sample(grid, r) for r in range(20)]
    assert first == again
    assert all(len(set(nodes)) == count for nodes in first)
    if count < 10:
        other = [strategy(clients_per_round=wanted, seed=2).sample(grid, r) for r in range(20)]
        assert first != other
        assert len({tuple(nodes) for nodes in first}) > 1


@pytest.mark.parametrize("codec", [Identity(), build("codec", "uniform", bits=4)])
def test_bytes_are_lengths_of_what_crossed(codec: Codec) -> None:
    grid = InlineGrid(constant_client(LAYOUT), 3)
    replies: list[Message] = []
    handler = grid.handler

    def keep(message: Message, partition: int) -> Message:
        replies.append(handler(message, partition))
        return replies[-1]

    grid.handler = keep
    fedq = strategy(codec=codec, downlink=codec)
    _, report = fedq.run_round(grid, fedq.initial(ZERO))
    assert report.downlink_bytes == sum(len(unpack(m.content)) for m in grid.seen)
    assert report.uplink_bytes == sum(len(unpack(m.content)) for m in replies)


def test_clients_see_the_downlink_and_the_server_keeps_its_master() -> None:
    seen: list[np.ndarray] = []

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        seen.append(task.weights)
        return task.reply(ZERO, examples=1, client=partition)

    codec = build("codec", "uniform", bits=2, scale="model")
    weights = np.linspace(-1, 1, LAYOUT.size).astype(np.float32)
    fedq = strategy(downlink=codec)
    after, _ = fedq.run_round(InlineGrid(handle, 2), fedq.initial(weights))
    np.testing.assert_array_equal(after.weights, weights)
    assert set(np.unique(seen[0])) <= {-1.0, 0.0, 1.0}


def test_flower_start_and_hooks_agree() -> None:
    initial = ArrayRecord({name: Array(x) for name, x in LAYOUT.unflatten(ZERO).items()})
    evaluated = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        evaluated.append(server_round)
        return MetricRecord({"sum": float(sum(a.numpy().sum() for a in arrays.values()))})

    grid = InlineGrid(constant_client(LAYOUT), 3)
    result = strategy().start(grid, initial, num_rounds=2, timeout=5, evaluate_fn=evaluate)
    assert evaluated == [1, 2]
    hooked = strategy()
    arrays = initial
    for server_round in (1, 2):
        messages = hooked.configure_train(server_round, arrays, {}, grid)  # type: ignore[arg-type]
        replies = grid.send_and_receive(messages)
        found, metrics = hooked.aggregate_train(server_round, replies)
        assert found is not None
        assert metrics is not None
        arrays = found
    for name in LAYOUT.names:
        np.testing.assert_array_equal(result.arrays[name].numpy(), arrays[name].numpy())
    assert result.train_metrics_clientapp[2]["replies"] == 3


def test_optimizer_state_is_carried() -> None:
    grid = InlineGrid(constant_client(LAYOUT), 2)
    fedq = strategy(server_optimizer=build("server_optimizer", "momentum", momentum=0.5))
    one, _ = fedq.run_round(grid, fedq.initial(ZERO))
    two, _ = fedq.run_round(grid, one)
    step = one.weights
    np.testing.assert_allclose(two.weights - one.weights, 1.5 * step, rtol=1e-6)


def test_requests_are_json_and_name_the_codec() -> None:
    grid = InlineGrid(constant_client(LAYOUT), 1)
    fedq = strategy(codec=build("codec", "uniform", bits=3), task={"note": 1}, seed=5)
    fedq.run_round(grid, fedq.initial(ZERO))[1]
    metadata = wire.unseal(unpack(grid.seen[0].content)).metadata
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["codec"]["bits"] == 3
    assert (metadata["note"], metadata["round"], metadata["seed"]) == (1, 1, 5)


def test_a_request_for_another_model_is_refused() -> None:
    grid = InlineGrid(constant_client(LAYOUT), 1)
    fedq = strategy()
    fedq.run_round(grid, fedq.initial(ZERO))
    with pytest.raises(DecodeError, match="another model"):
        Task.open(grid.seen[0], Layout.flat(3))
