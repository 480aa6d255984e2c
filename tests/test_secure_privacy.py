"""Privacy under secure aggregation: the masked sum is the trusted server's, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedq import Layout, build, records, secure_client, wire
from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.keys import Credentials, SimulatedRoster, simulated
from fedq.secure_server import SecureServer
from fedq.state import StateStore
from fedq.strategy import FedQ
from tests.grids import InlineGrid

# isort: split
from flwr.app import Error, Message

LAYOUT, STATE = Layout(("a", "b"), ((20, 3), (9,))), Layout.flat(2)
CLIENTS = 9
MECHANISMS: dict[str, dict[str, Any]] = {
    "skellam": {},
    "discrete_gaussian": {},
    "poisson_binomial": {"levels": 300, "noise_multiplier": 2.0},
}


def mechanism(name: str, **options: Any) -> Any:
    return build("privacy", name, **{"noise_multiplier": 1.0, **MECHANISMS[name], **options})


def delta(client: int) -> np.ndarray:
    x = np.random.default_rng(client).normal(size=LAYOUT.size)
    return (x * (client + 1) / np.linalg.norm(x)).astype(np.float32)


def strategy(privacy: Any, mode: str | None = "secagg", **options: Any) -> FedQ:
    secure = None
    if mode is not None:
        own = Credentials(simulated(0), SimulatedRoster(0))
        secure = SecureServer(build("secure_aggregation", mode), own)
    defaults = {"layout": LAYOUT, "codec": Identity(), "state_layout": STATE}
    return FedQ(**{**defaults, **options}, privacy=privacy, secure=secure)


Lie = Callable[[Message], Message]


def fleet(
    directory: Path,
    lose: dict[str, set[int]] | None = None,
    update: Callable[[int], np.ndarray] = delta,
    vectors: dict[int, list[bytes]] | None = None,
) -> Callable[[Message, int], Message]:
    """Clients that train at once; ``vectors`` collects what they would send without masks."""

    def handle(message: Message, client: int) -> Message:
        blob, store = records.unpack(message.content), StateStore(directory)
        secure = blob.startswith(wire.SECURE_MAGIC)
        phase = wire.unseal(blob, wire.SECURE_MAGIC).metadata["phase"] if secure else ""
        if client in (lose or {}).get(phase, ()):
            return Message(Error(2, "out of reach"), reply_to=message)
        if not secure:
            task = Task.open(message, LAYOUT, STATE, store)
            return task.reply(update(client), examples=client + 1, client=client, loss=1.0)

        def train(inner: bytes) -> Any:
            request = Message(records.pack(inner), reply_to=message)
            task = Task.open(request, LAYOUT, STATE, store)
            return task, SimpleNamespace(
                delta=update(client), state=task.state + 7, loss=1.0, examples=client + 1
            )

        own = Credentials(simulated(0, client), SimulatedRoster(0))
        return secure_client.answer(message, blob, client, lambda: own, store, train)

    return handle


def run(fedq: FedQ, handle: Callable[[Message, int], Message], rounds: int = 1) -> Any:
    state = fedq.initial(np.zeros(LAYOUT.size, np.float32))
    for _ in range(rounds):
        state, report = fedq.run_round(InlineGrid(handle, CLIENTS), state)
    return state, report


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("mode", ["secagg", "clear"])
def test_a_masked_sum_is_the_trusted_server_s(name: str, mode: str, tmp_path: Path) -> None:
    results = []
    for chosen in (None, mode):
        fedq = strategy(mechanism(name, seeded=True), chosen)
        after, report = run(fedq, fleet(tmp_path / str(chosen)), rounds=2)
        assert (report.replies, report.train_loss, report.rejected.total()) == (CLIENTS, None, 0)
        np.testing.assert_array_equal(after.state, np.zeros(2))  # it stays on the device
        ledger = after.privacy.ledger
        results.append((after.weights.tobytes(), report.privacy, ledger.clients.tolist()))
        assert sorted(after.clients.values()) == list(range(CLIENTS))
    assert results[0] == results[1]
    assert results[0][2] == list(range(CLIENTS))
    assert results[0][1]["epsilon"] > 0


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "agree", "unmask"])
def test_those_in_the_sum_pay_for_it(name: str, phase: str, tmp_path: Path) -> None:
    gone = {1, 5} if phase in ("advertise", "share", "mask") else set()
    trusted = strategy(mechanism(name, seeded=True), None)
    expected, of = run(trusted, fleet(tmp_path / "trusted", {"": gone}))
    fedq = strategy(mechanism(name, seeded=True))
    after, report = run(fedq, fleet(tmp_path / "masked", {phase: {1, 5}}))
    np.testing.assert_array_equal(after.weights, expected.weights)
    assert report.privacy == of.privacy
    assert after.privacy.ledger.clients.tolist() == [i for i in range(CLIENTS) if i not in gone]
    assert report.replies == CLIENTS - len(gone)


def test_a_sum_that_would_not_count_is_not_seen(tmp_path: Path) -> None:
    """The server would have learnt it for nothing: nobody would have been charged."""
    asked = []

    def handle(message: Message, client: int) -> Message:
        asked.append(wire.unseal(records.unpack(message.content), wire.SECURE_MAGIC).metadata)
        return inner(message, client)

    inner, fedq = fleet(tmp_path, {"mask": {1, 5}}), strategy(mechanism("skellam"), quorum=0.9)
    after, report = run(fedq, handle)
    assert report.skipped
    assert {said["phase"] for said in asked} == {"advertise", "share", "mask"}
    assert report.rejected == {"error": 2, "secure aggregation": 1}
    assert "7 of 9 clients" in " ".join(report.reasons)
    assert report.privacy["epsilon"] == 0
    assert not after.weights.any()


def test_noise_is_secret_and_an_answer_does_not_change(tmp_path: Path) -> None:
    """Asked twice for one round, clients add the same noise to the same update, else another."""

    def other(client: int) -> np.ndarray:
        return delta(client) + np.float32(1e-6)

    def end(directory: str, update: Callable[[int], np.ndarray] = delta) -> np.ndarray:
        return run(strategy(mechanism("skellam")), fleet(tmp_path / directory, None, update))[  # type: ignore[no-any-return]
            0
        ].weights

    first, again, changed, elsewhere = end("a"), end("a"), end("b"), end("b", other)
    np.testing.assert_array_equal(first, again)
    noise = np.abs(first - changed).mean()
    assert noise > 0.05 / CLIENTS  # of standard deviation 1 / CLIENTS each
    assert np.abs(changed - elsewhere).mean() > 0.05 / CLIENTS
