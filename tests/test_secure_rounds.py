"""Secure aggregation over a grid: the mean is that of whoever is left, or the model stays."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedq import Layout, build, records, secure_client, wire
from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.errors import ConfigError, FedqError
from fedq.keys import Credentials, SimulatedRoster, simulated
from fedq.random import derive
from fedq.rounds import ServerState
from fedq.secagg import PHASES, _words
from fedq.secagg._messages import SEALED_BYTES
from fedq.secagg.base import OnGrid
from fedq.secure_server import SecureServer
from fedq.state import StateStore
from fedq.strategy import PATIENCE, FedQ
from tests.grids import InlineGrid

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Error, Message

LAYOUT, STATE = Layout(("a", "b"), ((20, 3), (9,))), Layout.flat(2)
CLIENTS = 9
CREDENTIALS = Credentials(simulated(0), SimulatedRoster(0))


def mode(name: str = "secagg", **options: Any) -> OnGrid:
    chosen: OnGrid = build("secure_aggregation", name, clip=1.0, **options)
    return chosen


def strategy(secure: OnGrid, **options: Any) -> FedQ:
    server = SecureServer(secure, CREDENTIALS)
    defaults = {"layout": LAYOUT, "codec": Identity(), "state_layout": STATE, "max_examples": 100}
    return FedQ(**{**defaults, **options}, secure=server)


def delta(client: int) -> np.ndarray:
    return np.random.default_rng(client).uniform(-1, 1, LAYOUT.size).astype(np.float32)


Lie = Callable[[Message, Message, int], Message]


@dataclass
class Fleet:
    """Clients that keep their secrets in a store, as simulated ones do."""

    directory: Path
    lose: dict[str, set[int]] = field(default_factory=dict)
    tamper: Lie | None = None
    said: list[bytes] = field(default_factory=list)

    def __call__(self, message: Message, client: int) -> Message:
        blob = records.unpack(message.content)
        phase = wire.unseal(blob, wire.SECURE_MAGIC).metadata["phase"]
        if client in self.lose.get(phase, ()):
            return Message(Error(2, "out of reach"), reply_to=message)
        store = StateStore(self.directory)

        def train(inner: bytes) -> Any:
            request = Message(records.pack(inner), reply_to=message)
            task = Task.open(request, LAYOUT, STATE, store)
            return task, SimpleNamespace(
                delta=delta(client),
                state=task.state + np.float32(client),
                loss=float(client),
                examples=client + 1,
            )

        own = Credentials(simulated(0, client), SimulatedRoster(0))
        reply = secure_client.answer(message, blob, client, lambda: own, store, train)
        self.said.append(records.unpack(reply.content))
        return self.tamper(message, reply, client) if self.tamper else reply


def run(fedq: FedQ, fleet: Fleet, rounds: int = 1) -> tuple[ServerState, Any]:
    state = fedq.initial(np.zeros(LAYOUT.size, np.float32))
    for _ in range(rounds):
        state, report = fedq.run_round(InlineGrid(fleet, CLIENTS), state)
    return state, report


@pytest.mark.parametrize("rotate", [False, True])
def test_masked_and_clear_sums_give_the_same_model(tmp_path: Path, rotate: bool) -> None:
    states = {}
    for name in ("clear", "secagg"):
        fedq = strategy(mode(name, rotate=rotate, bits=6))
        states[name], report = run(fedq, Fleet(tmp_path / name), rounds=2)
        assert (report.replies, report.received, report.rejected.total()) == (9, 9, 0)
        assert report.train_loss == pytest.approx(sum(i * (i + 1) for i in range(9)) / 45, abs=1e-5)
    for key in ("weights", "state"):
        np.testing.assert_array_equal(getattr(states["clear"], key), getattr(states["secagg"], key))
    expected = sum((i + 1) * delta(i) for i in range(CLIENTS)) / 45
    error = np.abs(states["secagg"].weights - 2 * expected).max()
    assert 0 < error < 4 / 31
    assert states["secagg"].state == pytest.approx(2 * report.train_loss, abs=1e-3)


@pytest.mark.parametrize("phase", PHASES)
def test_whoever_is_lost_the_mean_is_that_of_the_others(phase: str, tmp_path: Path) -> None:
    fedq = strategy(mode(bits=12), weighting="uniform")
    state, report = run(fedq, Fleet(tmp_path, {phase: {1, 5}}))
    in_sum = [i for i in range(CLIENTS) if phase in ("agree", "unmask") or i not in (1, 5)]
    expected = np.mean([delta(i) for i in in_sum], axis=0)
    np.testing.assert_allclose(state.weights, expected, atol=1 / 2047)
    assert report.rejected == {"error": 2}
    assert report.replies == len(in_sum)


@pytest.mark.parametrize("phase", PHASES)
def test_below_the_threshold_the_round_fails_cleanly(phase: str, tmp_path: Path) -> None:
    fedq = strategy(mode())
    before = fedq.initial(np.zeros(LAYOUT.size, np.float32))
    grid = InlineGrid(Fleet(tmp_path, {phase: {0, 1, 2, 3}}), CLIENTS)
    after, report = fedq.run_round(grid, before)
    assert report.skipped
    assert after.failures == 1
    np.testing.assert_array_equal(after.weights, before.weights)
    assert report.rejected == {"error": 4, "secure aggregation": 1}
    for _ in range(PATIENCE - 2):
        after, _ = fedq.run_round(grid, after)
    with pytest.raises(FedqError, match="rounds in a row"):
        fedq.run_round(grid, after)


def test_a_robust_rule_over_groups(tmp_path: Path) -> None:
    """One group of three is hostile within the clip: the median of the groups stays honest."""
    fedq = strategy(
        mode("grouped", group_size=3, bits=12),
        aggregator=build("aggregator", "median"),
        weighting="uniform",
    )
    groups = fedq.secure.mode.groups(CLIENTS, derive(0, 1, "groups"))  # type: ignore[union-attr]
    assert sorted(i for group in groups for i in group) == list(range(CLIENTS))
    state, report = run(fedq, Fleet(tmp_path))
    means = np.array([np.mean([delta(i) for i in group], axis=0) for group in groups])
    np.testing.assert_allclose(state.weights, np.median(means, axis=0), atol=1 / 2047)
    assert report.replies == CLIENTS
    lost, report = run(fedq, Fleet(tmp_path / "lost", {"mask": set(groups[0][:2])}))
    np.testing.assert_allclose(lost.weights, np.median(means[1:], axis=0), atol=1 / 2047)
    assert report.replies == CLIENTS - 3


def garbage(message: Message, reply: Message, client: int) -> Message:
    if client != 4:
        return reply
    return Message(records.pack(bytes(100)), reply_to=message)


def too_many_parts(message: Message, reply: Message, client: int) -> Message:
    if client != 4:
        return reply
    envelope = wire.unseal(records.unpack(reply.content))
    more = wire.Envelope(envelope.metadata, [*envelope.parts, b""])
    return Message(records.pack(wire.seal(more)), reply_to=message)


@pytest.mark.parametrize("lie", [garbage, too_many_parts])
def test_a_bad_client_loses_itself(lie: Lie, tmp_path: Path) -> None:
    state, report = run(strategy(mode(bits=12), weighting="uniform"), Fleet(tmp_path, tamper=lie))
    assert report.replies == CLIENTS - 1
    expected = np.mean([delta(i) for i in range(CLIENTS) if i != 4], axis=0)
    np.testing.assert_allclose(state.weights, expected, atol=1 / 2047)
    assert set(report.rejected) <= {"malformed", "seed"}


def test_who_deals_wrong_shares_cannot_end_every_round(tmp_path: Path) -> None:
    def lie(message: Message, reply: Message, client: int) -> Message:
        envelope = wire.unseal(records.unpack(message.content), wire.SECURE_MAGIC)
        if client != 4 or envelope.metadata["phase"] != "share":
            return reply
        answer = wire.unseal(records.unpack(reply.content))
        size = (CLIENTS - 1) * SEALED_BYTES
        content = bytes(answer.parts[0])
        sealed = bytes(255 - byte for byte in content[-size:])
        fake = wire.Envelope(answer.metadata, [content[:-size] + sealed])
        return Message(records.pack(wire.seal(fake)), reply_to=message)

    fedq = strategy(mode(bits=12), weighting="uniform", guard=build("guard", "relative", strikes=2))
    fleet, state = Fleet(tmp_path, tamper=lie), fedq.initial(np.zeros(LAYOUT.size, np.float32))
    replies = []
    for _ in range(3):
        state, report = fedq.run_round(InlineGrid(fleet, CLIENTS), state)
        replies.append(report.replies)
    assert replies == [0, 0, CLIENTS - 1]
    assert report.rejected.total() == 0


def test_a_sum_beyond_what_honest_clients_send_is_refused(tmp_path: Path) -> None:
    """The one thing that a sum shows of a client that sends more than it may."""

    def lie(message: Message, reply: Message, client: int) -> Message:
        if client != 4:
            return reply
        envelope = wire.unseal(records.unpack(reply.content))
        segments = fedq.secure.mode.grid(1).segments(CLIENTS, LAYOUT.size, STATE.size)  # type: ignore[union-attr]
        integers = [np.full(segment.size, 2000) for segment in segments]
        body = _words.pack(_words.wrap(integers, segments), segments)
        fake = wire.Envelope(envelope.metadata, [bytes(envelope.parts[0][:16]) + body])
        return Message(records.pack(wire.seal(fake)), reply_to=message)

    fedq = strategy(mode("clear", bits=8), weighting="uniform")
    _, report = run(fedq, Fleet(tmp_path, tamper=lie))
    assert report.skipped
    assert report.rejected == {"secure aggregation": 1}


def test_a_model_of_ones_own_is_refused(tmp_path: Path) -> None:
    """A server that gives one client another task than it announced does not get its update."""

    def handle(message: Message, client: int) -> Message:
        request = wire.unseal(records.unpack(message.content), wire.SECURE_MAGIC)
        if client == 3 and request.metadata["phase"] == "mask":
            inner = wire.unseal(request.parts[1])
            other = wire.Envelope({**inner.metadata, "training": "none"}, inner.parts)
            lie = wire.Envelope(request.metadata, [request.parts[0], wire.seal(other)])
            content = records.pack(wire.seal(lie, wire.SECURE_MAGIC))
            message = Message(content, message.metadata.dst_node_id, "train")
            message.metadata.__dict__["_message_id"] = "fake"
        return fleet(message, client)

    fleet = Fleet(tmp_path)
    fedq = strategy(mode())
    state = fedq.initial(np.zeros(LAYOUT.size, np.float32))
    _, report = fedq.run_round(InlineGrid(handle, CLIENTS), state)
    assert any("not what the round announced" in reason for reason in report.reasons)
    assert report.replies == CLIENTS - 1


def test_secrets_are_the_owner_s_alone_and_end_with_the_round(tmp_path: Path) -> None:
    run(strategy(mode()), Fleet(tmp_path, {"agree": {0}}))
    files = sorted((tmp_path / "secret").iterdir())
    assert len(files) == CLIENTS
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o700
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        session = json.loads(path.read_bytes())["session"]
        assert (session is None) == (path.name != "0")  # client 0 was lost: until its next round


def test_no_key_leaves_a_client(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, {"agree": set(range(CLIENTS))})
    run(strategy(mode()), fleet)
    everything = b"".join(fleet.said)
    for path in (tmp_path / "secret").iterdir():
        session = json.loads(path.read_bytes())["session"]
        for name in ("share_secret", "mask_secret", "own_seed"):
            assert bytes.fromhex(session[name]) not in everything
        for share in session["shares"].values():
            assert bytes.fromhex(share) not in everything


def test_a_client_without_keys_says_so(tmp_path: Path) -> None:
    def missing() -> Credentials:
        raise ConfigError("this device has no keys")

    def handle(message: Message, client: int) -> Message:
        if client:
            return fleet(message, client)
        blob = records.unpack(message.content)
        return secure_client.answer(message, blob, 0, missing, StateStore(tmp_path), lambda _: None)  # type: ignore[arg-type,return-value]

    fleet, fedq = Fleet(tmp_path), strategy(mode())
    _, report = fedq.run_round(InlineGrid(handle, CLIENTS), fedq.initial(np.zeros(69, np.float32)))
    assert report.rejected == {"dropped": 1}
    assert "no keys" in report.reasons[0]


def test_bytes_of_all_phases_are_counted(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    _, report = run(strategy(mode()), fleet)
    assert report.uplink_bytes == sum(map(len, fleet.said))
    assert len(fleet.said) == CLIENTS * len(PHASES)


def test_flower_s_hooks_cannot_run_several_messages() -> None:
    fedq = strategy(mode())
    with pytest.raises(ConfigError, match="several messages"):
        fedq.configure_train(1, ArrayRecord(), ConfigRecord(), InlineGrid(Fleet(Path()), 3))
