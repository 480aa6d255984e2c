"""Signed requests and sealed replies: the same model, and nobody in between."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedq import Layout, build, config, node, records, sealing, simulation, wire
from fedq.client import Client, SimulatedSite, Task
from fedq.codecs.identity import Identity
from fedq.envelope import OVERHEAD_BYTES, Round, seal
from fedq.errors import ConfigError, DecodeError
from fedq.keys import Credentials, Fleet, SimulatedRoster, make_device, simulated
from fedq.random import derive
from fedq.sealing import Sealing
from fedq.secagg import RefusedError
from fedq.strategy import FedQ
from fedq.training import trainer_for
from tests.grids import Handler, InlineGrid, constant_client

# isort: split
from flwr.app import Context, Message, RecordDict

LAYOUT = Layout(("a", "b"), ((2, 3), (1,)))
ZERO = np.zeros(LAYOUT.size, np.float32)
CREDENTIALS = Credentials(simulated(0), SimulatedRoster(0))


def strategy(**options: Any) -> FedQ:
    return FedQ(
        **{"layout": LAYOUT, "codec": Identity(), "sealing": Sealing(CREDENTIALS), **options}
    )


def sealed(
    reply: Message, message: Message, about: Round, client: int, signer: int | None = None
) -> Message:
    blob = seal(
        records.unpack(reply.content),
        about,
        client=client,
        identity=simulated(0, client if signer is None else signer),
        server=simulated(0).public,
    )
    return Message(records.pack(blob), reply_to=message)


def honest(message: Message, partition: int) -> Message:
    about = sealing.requested(records.unpack(message.content))
    assert about is not None
    reply = constant_client(LAYOUT)(message, partition)
    return sealed(reply, message, about, partition)


def test_seals_change_nothing_but_bytes() -> None:
    plain, signed = strategy(sealing=None), strategy()
    one, first = plain.run_round(InlineGrid(constant_client(LAYOUT), 3), plain.initial(ZERO))
    two, second = signed.run_round(InlineGrid(honest, 3), signed.initial(ZERO))
    np.testing.assert_array_equal(one.weights, two.weights)
    assert second.uplink_bytes == first.uplink_bytes + 3 * OVERHEAD_BYTES
    assert not second.rejected


def lies(kind: str) -> Handler:
    def handle(message: Message, partition: int) -> Message:
        good = honest(message, partition)
        if partition != 1:
            return good
        reply = constant_client(LAYOUT)(message, 1)
        about = sealing.requested(records.unpack(message.content))
        assert about is not None
        if kind == "not sealed":
            return reply
        if kind == "sealed by another":
            return sealed(reply, message, about, 1, signer=2)
        if kind == "another round":
            return sealed(reply, message, dataclasses.replace(about, number=9), 1)
        if kind == "another model":
            return sealed(reply, message, dataclasses.replace(about, base=bytes(32)), 1)
        blob = bytearray(records.unpack(good.content))
        if kind == "changed":
            blob[-20] ^= 1
        if kind == "truncated":
            del blob[-1]
        return Message(records.pack(bytes(blob)), reply_to=message)

    return handle


@pytest.mark.parametrize(
    "kind",
    ["not sealed", "sealed by another", "another round", "another model", "changed", "truncated"],
)
def test_a_bad_seal_loses_its_own_update_only(kind: str) -> None:
    fedq = strategy()
    after, report = fedq.run_round(InlineGrid(lies(kind), 4), fedq.initial(ZERO))
    np.testing.assert_allclose(after.weights, (1 + 9 + 16) / 8, rtol=1e-6)
    assert report.rejected == {"malformed": 1}


def test_a_replay_from_the_round_before_is_refused() -> None:
    old: list[Message] = []

    def handle(message: Message, partition: int) -> Message:
        if partition == 1 and old:
            return Message(old[0].content, reply_to=message)
        reply = honest(message, partition)
        if partition == 1:
            old.append(reply)
        return reply

    fedq = strategy()
    state = fedq.initial(ZERO)
    for rejected in (0, 1):
        state, report = fedq.run_round(InlineGrid(handle, 4), state)
        assert report.rejected.total() == rejected


# --- a device ------------------------------------------------------------------------------------


def request(**changes: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return a signed request's metadata and model, and change it afterwards."""
    weights, state = np.ones(5, np.float32), np.zeros(2, np.float32)
    told = {"round": 1, "seed": 0, "codec": {"name": "uniform", "bits": 8}}
    signed = Sealing(CREDENTIALS).announced(told, 10, weights, state)
    return {**signed, "base": 3, "keep": True, **changes}, weights, state


def test_what_is_announced_to_all_is_accepted() -> None:
    metadata, weights, state = request()
    sealing.check(metadata, weights, state, SimulatedRoster(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": {"name": "uniform", "bits": 1}},
        {"cohort": 2},
        {"round": 2},
        {"sealed": False},
        {"signature": "00" * 64},
        {"signature": None},
        {"bound": "00" * 32},
        {"extra": 1},
    ],
)
def test_a_downgrade_is_refused(changes: dict[str, Any]) -> None:
    metadata, weights, state = request(**changes)
    with pytest.raises(RefusedError):
        sealing.check(metadata, weights, state, SimulatedRoster(0))


def test_another_model_or_server_is_refused() -> None:
    metadata, weights, state = request()
    with pytest.raises(RefusedError):
        sealing.check(metadata, weights + 1, state, SimulatedRoster(0))
    with pytest.raises(RefusedError):
        sealing.check(metadata, weights, state + 1, SimulatedRoster(0))
    with pytest.raises(RefusedError):
        sealing.check(metadata, weights, state, SimulatedRoster(1))


def test_a_request_that_does_not_say_what_it_is() -> None:
    for metadata in ({"sealed": True}, {"sealed": True, "codec": 1, "bound": "x", "round": 1}):
        with pytest.raises(Exception, match="what a seal would be for"):
            sealing.requested(wire.seal(wire.Envelope(metadata)))
    phase = wire.Envelope({"sealed": True, "phase": "mask", "round": 1})
    with pytest.raises(DecodeError):
        sealing.requested(wire.seal(phase, wire.SECURE_MAGIC))
    assert sealing.requested(wire.seal(wire.Envelope({}))) is None


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    made = Fleet.init(tmp_path / "fleet")
    for client in range(3):
        device = tmp_path / str(client)
        made.add(client, make_device(device))
    for client in range(3):
        for path in (made.directory / "public").iterdir():
            (tmp_path / str(client) / path.name).write_bytes(path.read_bytes())
    return made


def devices(tmp_path: Path) -> Handler:
    """Real clients with keys and data of their own."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)).astype(np.float32), np.arange(12) % 3
    data = tmp_path / "own.npz"
    np.savez(data, x_train=x, y_train=y, x_test=x, y_test=y)
    site = node.DeviceSite(build("data", "npz", path=str(data)), tmp_path / "state")
    clients = [Client(site) for _ in range(3)]

    def handle(message: Message, partition: int) -> Message:
        own = {"partition-id": partition, "keys": str(tmp_path / str(partition))}
        return clients[partition].train(message, Context(1, partition, own, RecordDict(), {}))

    return handle


@pytest.mark.parametrize("mode", ["none", "secagg"])
def test_a_fleet_with_keys(mode: str, fleet: Fleet, tmp_path: Path) -> None:
    """Devices train under seals, with and without masks; without signatures they refuse."""
    from fedq.secure_server import SecureServer

    experiment = config.load(["model=mlp", f"secure_aggregation={mode}", "codec=identity"])
    spec = {
        "model": {"name": "mlp"},
        "quantization": {"name": "none"},
        "input_shape": [5],
        "classes": 3,
    }
    trainer = trainer_for(**spec, seed=derive(0, "model"))
    own = Credentials.load(fleet.directory / "server")
    chosen = experiment.secure_aggregation
    secure = SecureServer(chosen, own) if chosen.integers else None

    def federation(seals: Sealing | None) -> FedQ:
        return FedQ(
            layout=trainer.layout,
            state_layout=trainer.state_layout,
            codec=Identity(),
            task={**spec, "training": experiment.training.to_config()},
            initial=trainer.weights(),
            sealing=seals,
            secure=secure,
        )

    grid, fedq = InlineGrid(devices(tmp_path), 3), federation(Sealing(own))
    state = fedq.initial(trainer.weights(), trainer.state())
    for _ in range(2):
        before = state
        state, report = fedq.run_round(grid, state)
        assert (report.replies, report.rejected.total()) == (3, 0)
        assert (state.weights != before.weights).any()
    fedq = federation(None)
    _, report = fedq.run_round(grid, fedq.initial(trainer.weights(), trainer.state()))
    assert report.rejected["dropped"] == 3
    assert "not signed by our server" in report.reasons[0]
    fleet.revoke(2)
    fedq = federation(Sealing(Credentials.load(fleet.directory / "server")))
    _, report = fedq.run_round(grid, fedq.initial(trainer.weights(), trainer.state()))
    assert any("not on the roster" in reason for reason in report.reasons)


def test_a_device_without_keys_says_how_to_get_some(fleet: Fleet, tmp_path: Path) -> None:
    site = node.DeviceSite(build("data", "digits"), tmp_path)

    def asked(**options: str | int) -> Context:
        return Context(1, 2, options, RecordDict(), {})  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="fedq keys device"):
        site.credentials(asked())
    own = str(tmp_path / "0")
    assert site.credentials(asked(keys=own)).smallest == 3
    assert site.credentials(asked(keys=own, **{"smallest-sum": 9})).smallest == 9
    with pytest.raises(ConfigError, match="smallest-sum"):
        site.credentials(asked(keys=own, **{"smallest-sum": 2}))


def test_simulated_clients_take_no_keys(tmp_path: Path) -> None:
    experiment = config.load(["keys=somewhere", "sealed=true", "baseline=false"])
    with pytest.raises(ConfigError, match="real fleet"):
        simulation.run_experiment(experiment, tmp_path / "run")


def test_a_simulated_site_has_keys_and_demands_nothing(tmp_path: Path) -> None:
    site = SimulatedSite(build("data", "digits"), {0: np.arange(3)}, tmp_path, seed=4)
    asked = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
    assert site.credentials(asked).identity.public == simulated(4, 0).public
    assert not site.wants_signatures(asked)


def test_task_replies_are_not_sealed_by_themselves() -> None:
    """An app of one's own seals as Client does; its unsealed reply is refused by name."""
    fedq = strategy(quorum=0.1)

    def handle(message: Message, partition: int) -> Message:
        return Task.open(message, LAYOUT).reply(ZERO, examples=1, client=partition)

    _, report = fedq.run_round(InlineGrid(handle, 2), fedq.initial(ZERO))
    assert report.rejected == {"malformed": 2}
    assert "not a sealed update" in report.reasons[0] or "sealed update of" in report.reasons[0]
