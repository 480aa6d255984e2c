"""Privacy under secure aggregation: the masked sum is the trusted server's, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedq import Layout, build, config, records, registry, secure_client, simulation, wire
from fedq.client import Task
from fedq.codecs._hadamard import piece_sizes
from fedq.codecs.identity import Identity
from fedq.errors import ConfigError
from fedq.keys import Credentials, SimulatedRoster, simulated
from fedq.results import read_rounds
from fedq.secagg import Announcement, binding
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


def fleet(
    directory: Path,
    lose: dict[str, set[int]] | None = None,
    update: Callable[[int], np.ndarray] = delta,
) -> Callable[[Message, int], Message]:
    """Clients that need no time to train, and answer a trusted server or a masked round."""

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
        state, _ = run(strategy(mechanism("skellam")), fleet(tmp_path / directory, None, update))
        return np.asarray(state.weights)

    first, again, changed, elsewhere = end("a"), end("a"), end("b"), end("b", other)
    np.testing.assert_array_equal(first, again)
    for one in (first, elsewhere):  # of standard deviation 1 / CLIENTS each
        assert np.abs(one - changed).mean() > 0.5 / CLIENTS


# --- a hostile server ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("privacy", "cohort", "bits", "says"),
    [
        (mechanism("skellam"), CLIENTS, 16, None),
        (mechanism("skellam"), 1000, 16, "noise for a sum of 1000 clients"),
        (mechanism("skellam"), CLIENTS, 32, "no room for what clients send, or too much"),
        (build("privacy", "gaussian", noise_multiplier=1.0), CLIENTS, 16, "protects no sum"),
    ],
)
def test_a_client_holds_its_server_to_the_announced_sum(
    privacy: Any, cohort: int, bits: int, says: str | None, tmp_path: Path
) -> None:
    weights, state = np.zeros(LAYOUT.size, np.float32), np.zeros(STATE.size, np.float32)
    task = {"round": 1, "seed": 0, "codec": {"name": "identity"}, "cohort": cohort}
    task["privacy"] = registry.to_config(privacy)
    inner = wire.seal(
        wire.Envelope(task, [Identity().encode(weights, LAYOUT), Identity().encode(state, STATE)])
    )
    announced = Announcement(
        run="run",
        round=1,
        session="0" * 32,
        clients=CLIENTS,
        neighbours=0,
        threshold=0,
        parts=((sum(piece_sizes(LAYOUT.size)), bits),),
        coding={},
        base=binding(task, weights, state),
    )
    text = announced.sealed(simulated(0).signing)
    request = wire.Envelope({"phase": "clear", "round": 1}, [text, inner])
    message = Message(records.pack(wire.seal(request, wire.SECURE_MAGIC)), 2, "train")
    message.metadata.__dict__["_message_id"] = "1"
    said = wire.unseal(records.unpack(fleet(tmp_path)(message, 0).content)).metadata
    assert ("dropped" in said) is (says is not None)
    assert says is None or says in said["dropped"]


# --- whole runs ----------------------------------------------------------------------------------

SMALL = (
    "data=digits",
    "model=mlp",
    "model.hidden=[8]",
    "clients=10",
    "clients_per_round=5",
    "local_epochs=1",
    "baseline=false",
    "engine.workers=1",
    "rounds=2",
)


def whole(path: Path, *overrides: str) -> dict[str, Any]:
    experiment = config.load([*SMALL, *overrides])
    return simulation.run_experiment(experiment, path).summary


def test_a_run_is_the_trusted_one_and_states_it_against_the_server(tmp_path: Path) -> None:
    options = ("privacy=skellam", "privacy.noise_multiplier=1", "privacy.seeded=true")
    modes = {"none": options, "secagg": (*options, "secure_aggregation=secagg", "sealed=true")}
    said = {name: whole(tmp_path / name, *chosen) for name, chosen in modes.items()}
    assert said["secagg"]["model_sha256"] == said["none"]["model_sha256"]
    lines = [[r.get("privacy") for r in read_rounds(tmp_path / name)] for name in modes]
    assert lines[0] == lines[1]
    stated = [{**said[name]["privacy"]} for name in modes]
    against = [one.pop("against") for one in stated]
    assert stated[0] == stated[1]
    assert "Without secure aggregation the server sees each" in against[0]
    assert "the server included" in against[1]


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_budget_stops_a_masked_run(name: str, tmp_path: Path) -> None:
    """The ledger knows who is asked: numbers that the clients proved."""
    options = [f"privacy.{key}={value}" for key, value in MECHANISMS[name].items()]
    if "privacy.noise_multiplier=2.0" not in options:
        options.append("privacy.noise_multiplier=1")
    options += [f"privacy={name}", "privacy.epsilon=9", "secure_aggregation=secagg", "rounds=20"]
    said = whole(tmp_path / "run", *options, "clients=5")
    assert 3 < said["privacy"]["epsilon"] <= 9
    assert "privacy budget" in said["stopped"]


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["secagg", "grouped", "clear"])
@pytest.mark.parametrize("name", ["gaussian", "adaptive_gaussian", "example_gaussian"])
def test_mechanisms_of_single_updates_are_refused(name: str, mode: str) -> None:
    options = [f"privacy={name}", "privacy.noise_multiplier=1", "quantization=none"]
    with pytest.raises(ConfigError, match="choose a mechanism on integers"):
        config.load([*options, f"secure_aggregation={mode}"])


def test_noise_for_the_cohort_is_refused_for_groups() -> None:
    options = ["privacy=skellam", "privacy.noise_multiplier=1", "secure_aggregation=grouped"]
    with pytest.raises(ConfigError, match="choose secure_aggregation=secagg"):
        config.load(options)


def test_noisy_codes_do_not_depend_on_weights() -> None:
    """Weights are all alike, and the modulus is the mechanism's: no limit of the grid applies."""
    options = ["privacy=skellam", "privacy.noise_multiplier=1", "secure_aggregation=secagg"]
    wide = ["secure_aggregation.bits=16", "max_examples=100000"]
    assert config.load([*options, *wide]).privacy.integers
    with pytest.raises(ConfigError, match="needs 36 bits"):
        config.load(["secure_aggregation=secagg", *wide])
