"""The client and the whole path of bytes: what the server counts is what a grid saw."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedq.client
from fedq import Layout, build, config, records, registry, server, simulation, wire
from fedq.client import NoBaseError, SimulatedSite, Task, client_app
from fedq.codecs import Codec
from fedq.data.base import load
from fedq.engines.local import LocalGrid
from fedq.errors import ConfigError, FedqError
from fedq.results import RunDirectory
from fedq.rounds import ServerState
from fedq.state import StateStore
from fedq.strategy import FedQ
from tests.grids import CountingGrid, Handler, InlineGrid, envelope, raw_reply, toy_app

# isort: split
from flwr.app import Message

TINY = ["data=digits", "clients=6", "clients_per_round=3", "rounds=2", "local_epochs=1"]


@pytest.mark.parametrize("codec", ["dithered", "identity", "top_k_feedback"])
def test_bytes_in_rounds_are_bytes_a_counting_grid_saw(tmp_path: Path, codec: str) -> None:
    experiment = config.load([*TINY, f"codec={codec}"])
    dataset = load(experiment.data)
    parts = simulation.partition(experiment, dataset)
    site = partial(
        simulation.make_site, registry.to_config(experiment.data), (), parts, tmp_path / "state", 16
    )
    with (
        LocalGrid(partial(client_app, site), len(parts), workers=2) as grid,
        RunDirectory.create(tmp_path / "run", experiment.to_config()) as directory,
    ):
        counting = CountingGrid(grid)
        summary = server.run(counting, experiment, dataset, directory)
        records = directory.rounds()
    assert counting.up == summary["uplink_bytes"] == sum(r["uplink_bytes"] for r in records)
    assert counting.down == summary["downlink_bytes"] == sum(r["downlink_bytes"] for r in records)
    assert counting.up > 0


@pytest.mark.parametrize("history", [0, 1, 3])
def test_changes_are_shorter_and_decode_to_the_same_model(tmp_path: Path, history: int) -> None:
    options = [*TINY, "clients=8", "rounds=9", f"downlink_history={history}"]
    experiment = config.load([*options, "codec=identity"])
    outcome = simulation.run_experiment(experiment, tmp_path / "changes")
    whole = simulation.run_experiment(experiment.replace(downlink_history=0), tmp_path / "whole")
    assert outcome.summary["rejected"] == {}
    assert outcome.summary["model_sha256"] == whole.summary["model_sha256"]
    if history:
        assert outcome.summary["downlink_bytes"] < 0.95 * whole.summary["downlink_bytes"]


def test_a_client_that_lost_its_model_gets_the_whole_one_next_time(tmp_path: Path) -> None:
    layout = Layout.flat(5000)
    store = StateStore(tmp_path / "state")
    codec = build("codec", "uniform", bits=6, scale="model")

    def handle(message: Message, partition: int) -> Message:
        try:
            task = Task.open(message, layout, store=store)
        except NoBaseError as error:
            return Task.refuse(message, error)
        return task.reply(np.full(5000, 0.01, np.float32), examples=1, client=partition)

    grid = InlineGrid(handle, 1)
    fedq = FedQ(layout=layout, codec=codec, downlink=codec)
    state = fedq.initial(np.linspace(-1, 1, 5000, dtype=np.float32))
    sizes, reports = [], []
    for server_round in range(1, 6):
        if server_round == 4:
            shutil.rmtree(tmp_path / "state")
        state, report = fedq.run_round(grid, state)
        sizes.append(report.downlink_bytes)
        reports.append(report)
    assert sizes[1] < sizes[0] / 2
    assert reports[3].rejected == {"no base": 1}
    assert reports[4].rejected == {}
    assert sizes[4] > 2 * sizes[1]


def test_the_first_model_is_the_change_to_one_that_clients_build(tmp_path: Path) -> None:
    experiment = config.load([*TINY, "clients_per_round=6", "downlink=lattice"])
    run = simulation.run_experiment(experiment, tmp_path / "run")
    whole = simulation.run_experiment(experiment.replace(downlink_history=0), tmp_path / "whole")
    first, sent = (RunDirectory(out.path).rounds()[1] for out in (run, whole))
    assert first["rejected"] == {}
    assert first["downlink_bytes"] < sent["downlink_bytes"] / 2


def test_a_client_that_builds_another_model_gets_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fedq.client._initial

    def wrong(metadata: Mapping[str, Any]) -> np.ndarray:
        return np.nextafter(right(metadata), np.float32(1))

    monkeypatch.setattr("fedq.client._initial", wrong)
    options = [*TINY, "clients_per_round=6", "downlink=lattice", "rounds=3", "downlink_history=1"]
    run = simulation.run_experiment(config.load([*options, "quorum=0.1"]), tmp_path / "run")
    rejected = [record["rejected"] for record in RunDirectory(run.path).rounds()]
    assert rejected == [{}, {"no base": 6}, {}, {}]


def test_a_resumed_server_knows_which_client_is_which_node(tmp_path: Path) -> None:
    experiment = config.load([*TINY, "clients_per_round=6", "rounds=1", f"run_dir={tmp_path}/run"])
    simulation.run_experiment(experiment, tmp_path / "run")
    dataset = load(experiment.data)
    with LocalGrid(toy_app, 6) as grid, RunDirectory.open(tmp_path / "run") as directory:
        state = server._Server(grid, experiment, dataset, directory, lambda record: None).resumed()
    assert state.clients == {node: place for place, node in enumerate(grid.get_node_ids())}


def test_a_client_without_data_says_so(tmp_path: Path) -> None:
    experiment = config.load(TINY)
    rows = {0: np.arange(0), 1: np.arange(50)}
    app = client_app(lambda: SimulatedSite(experiment.data, rows, tmp_path))
    with LocalGrid(lambda: app, 2, workers=1) as grid:
        directory = RunDirectory.create(tmp_path / "run", {})
        server.run(
            grid,
            experiment.replace(clients=2, clients_per_round=2, rounds=1),
            load(experiment.data),
            directory,
        )
        (_, record) = directory.rounds()
    assert record["rejected"] == {"dropped": 1}
    assert "client 0 has no training data" in record["reasons"][0]


LAYOUT = Layout.flat(6)


def test_error_feedback_keeps_what_was_lost(tmp_path: Path) -> None:
    codec = build("codec", "error_feedback", inner={"name": "top_k", "fraction": 0.3})
    store = StateStore(tmp_path)
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(5, 6)).astype(np.float32)
    sent = []

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        return task.reply(deltas[task.round - 1], examples=1, client=partition, store=store)

    grid = InlineGrid(handle, 1)
    fedq = FedQ(layout=LAYOUT, codec=codec)
    state = fedq.initial(np.zeros(6, np.float32))
    for _ in range(5):
        after, _ = fedq.run_round(grid, state)
        sent.append(after.weights - state.weights)
        state = after
    residual = store.residual(0, 99, LAYOUT)
    np.testing.assert_allclose(np.sum(sent, 0) + residual, deltas.sum(0), atol=1e-5)
    assert len(list(tmp_path.rglob("*.f32"))) == 2


def test_a_residual_of_the_future_is_not_used(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.keep_residual(4, 1, np.full(6, 1, np.float32))
    store.keep_residual(4, 2, np.full(6, 2, np.float32))
    assert store.residual(4, 2, LAYOUT)[0] == 1
    assert store.residual(4, 3, LAYOUT)[0] == 2
    assert store.residual(4, 1, LAYOUT)[0] == 0
    assert store.residual(5, 3, LAYOUT)[0] == 0
    (tmp_path / "residual" / "4" / "000002.f32").write_bytes(b"torn")
    assert store.residual(4, 3, LAYOUT)[0] == 1


def test_error_feedback_without_a_store_is_refused() -> None:
    codec = build("codec", "error_feedback", inner="sign")

    def handle(message: Message, partition: int) -> Message:
        with pytest.raises(ConfigError, match="needs a store"):
            Task.open(message, LAYOUT).reply(np.ones(6, np.float32), examples=1, client=0)
        return Task.open(message, LAYOUT).drop("tested")

    fedq = FedQ(layout=LAYOUT, codec=codec)
    fedq.run_round(InlineGrid(handle, 1), fedq.initial(np.zeros(6, np.float32)))


def test_an_unwritable_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedqError, match="cannot keep client state"):
        StateStore(tmp_path / "file").keep_residual(0, 1, np.zeros(6, np.float32))


def test_a_flower_app_of_one_s_own_needs_three_lines() -> None:
    """The third user: compression in their own Flower app."""
    target = np.linspace(-1, 1, 6).astype(np.float32)

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        return task.reply(0.5 * (target - task.weights), examples=10, client=partition)

    fedq = FedQ(layout=LAYOUT, codec=build("codec", "uniform", bits=6, rounding="dithered"))
    with LocalGrid(lambda: toy_app(handle), 8, workers=2) as grid:
        state = fedq.initial(np.zeros(6, np.float32))
        for _ in range(12):
            state, _ = fedq.run_round(grid, state)
    np.testing.assert_allclose(state.weights, target, atol=0.01)


# --- context across rounds ---------------------------------------------------------------------

WIDE = Layout(("w",), ((60, 100),))
DTCQ = build("codec", "dtcq", bits=2.0)
Tamper = Callable[[Task, Message, Message, int], Message]


def steady_client(store: StateStore, tamper: Tamper | None = None) -> Handler:
    """Answers with the same delta in every round, so that the last move foretells it."""
    rng = np.random.default_rng(0)
    sizes = np.where(rng.random(WIDE.size) < 0.2, 0.1, 0.001)
    delta = (sizes * rng.uniform(0.5, 1.5, WIDE.size)).astype(np.float32)

    def handle(message: Message, partition: int) -> Message:
        try:
            task = Task.open(message, WIDE, store=store)
        except NoBaseError as error:
            return Task.refuse(message, error)
        reply = task.reply(delta, examples=1, client=partition, store=store)
        return reply if tamper is None else tamper(task, message, reply, partition)

    return handle


def context_of(reply: Message) -> Any:
    return wire.unseal(records.unpack(reply.content)).metadata.get("context")


def with_context(codec: Codec = DTCQ, **options: Any) -> FedQ:
    lattice = build("codec", "lattice", step=0.05)
    options = {"uplink_context": True, **options}
    return FedQ(layout=WIDE, codec=codec, downlink=lattice, **options)


def at_random(fedq: FedQ) -> ServerState:
    return fedq.initial(np.random.default_rng(1).standard_normal(WIDE.size).astype(np.float32))


class Heard(list[Any]):
    """The contexts that replies name, in turn."""

    def __call__(self, task: Task, message: Message, reply: Message, partition: int) -> Message:
        self.append(context_of(reply))
        return reply


@pytest.mark.parametrize("feedback", [False, True])
def test_a_context_shortens_updates_and_changes_nothing_else(
    tmp_path: Path, feedback: bool
) -> None:
    codec = build("codec", "error_feedback", inner=DTCQ) if feedback else DTCQ
    weights, sizes, heard = {}, {}, {}
    for on in (False, True):
        heard[on] = Heard()
        grid = InlineGrid(steady_client(StateStore(tmp_path / str(on)), heard[on]), 2)
        fedq = with_context(codec, uplink_context=on)
        state, sizes[on] = at_random(fedq), []
        for _ in range(4):
            state, report = fedq.run_round(grid, state)
            assert not report.rejected
            sizes[on].append(report.uplink_bytes)
        weights[on] = state.weights.tobytes()
    assert weights[True] == weights[False]
    assert heard[False] == [None] * 8
    assert heard[True] == [None, None, 1, 1, 2, 2, 3, 3]
    assert sizes[True][0] == sizes[False][0]
    assert sum(sizes[True][1:]) < 0.95 * sum(sizes[False][1:])


def test_a_context_that_does_not_help_is_not_used(tmp_path: Path) -> None:
    leap, heard = build("server_optimizer", "sgd", learning_rate=30.0), Heard()
    grid = InlineGrid(steady_client(StateStore(tmp_path), heard), 1)
    fedq = with_context(build("codec", "uniform", bits=3), server_optimizer=leap)
    state = at_random(fedq)
    for _ in range(2):
        state, _ = fedq.run_round(grid, state)
    assert heard == [None, None]


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (1, "not asked to use"),
        (99, "not asked to use"),
        (True, "not asked to use"),
        ("2", "not asked to use"),
        (None, "layouts differ"),
    ],
)
def test_no_other_context_can_be_claimed(tmp_path: Path, claim: Any, reason: str) -> None:
    def tamper(task: Task, message: Message, reply: Message, partition: int) -> Message:
        if task.round != 3 or partition:
            return reply
        assert context_of(reply) == 2
        opened = wire.unseal(records.unpack(reply.content))
        metadata = {**opened.metadata, "context": claim}
        return raw_reply(message, envelope(metadata, *map(bytes, opened.parts)))

    grid = InlineGrid(steady_client(StateStore(tmp_path), tamper), 3)
    fedq = with_context()
    state = at_random(fedq)
    for _ in range(3):
        state, report = fedq.run_round(grid, state)
    assert report.rejected == {"malformed": 1}
    assert reason in report.reasons[0]


def test_an_update_beside_something_else_does_not_count(tmp_path: Path) -> None:
    def tamper(task: Task, message: Message, reply: Message, partition: int) -> Message:
        if task.moved is None or partition:
            return reply
        other = task.moved.copy()
        other[7] = np.nextafter(other[7], np.float32(1))
        task = dataclasses.replace(task, moved=other)
        reply = task.reply(other, examples=1, client=partition)
        assert context_of(reply) == 1
        return reply

    grid = InlineGrid(steady_client(StateStore(tmp_path), tamper), 3)
    fedq = with_context()
    state, _ = fedq.run_round(grid, at_random(fedq))
    _, report = fedq.run_round(grid, state)
    assert report.rejected == {"malformed": 1}
    assert "references" in report.reasons[0]


def test_a_context_that_was_not_offered_does_not_count(tmp_path: Path) -> None:
    def tamper(task: Task, message: Message, reply: Message, partition: int) -> Message:
        moved = task.weights - np.float32(1)
        task = dataclasses.replace(task, moved=moved, metadata={**task.metadata, "base": 1})
        reply = task.reply(moved, examples=1, client=partition)
        assert context_of(reply) == 1
        return reply

    fedq = with_context()
    grid = InlineGrid(steady_client(StateStore(tmp_path), tamper), 2)
    _, report = fedq.run_round(grid, at_random(fedq))
    assert report.rejected == {"malformed": 2}


def test_a_client_that_lost_its_base_codes_without_a_context(tmp_path: Path) -> None:
    heard = Heard()
    grid = InlineGrid(steady_client(StateStore(tmp_path / "state"), heard), 1)
    fedq = with_context()
    state, rejected = at_random(fedq), []
    for server_round in range(1, 6):
        if server_round == 3:
            shutil.rmtree(tmp_path / "state")
        state, report = fedq.run_round(grid, state)
        rejected.append(dict(report.rejected))
    assert rejected == [{}, {}, {"no base": 1}, {}, {}]
    assert heard == [None, 1, None, 4]


def test_a_round_that_is_done_again_gives_the_same(tmp_path: Path) -> None:
    codec = build("codec", "error_feedback", inner=DTCQ)
    heard = Heard()
    grid = InlineGrid(steady_client(StateStore(tmp_path), heard), 3)
    fedq = with_context(codec)
    state = at_random(fedq)
    for _ in range(2):
        state, _ = fedq.run_round(grid, state)
    cut, report = fedq.run_round(grid, state)  # the server is killed before it is written
    sent = {r: bytes(bytearray(blob)) for r, blob in state.broadcasts.sent.items()}
    broadcasts = dataclasses.replace(state.broadcasts, sent=sent)
    again, same = with_context(codec).run_round(
        grid, dataclasses.replace(state, broadcasts=broadcasts)
    )
    assert again.weights.tobytes() == cut.weights.tobytes()
    assert (same.uplink_bytes, same.rejected) == (report.uplink_bytes, {})
    assert heard[6:] == [2] * 6


def test_a_context_is_held_once_per_base_however_many_clients(tmp_path: Path) -> None:
    grid = InlineGrid(steady_client(StateStore(tmp_path)), 20)
    fedq = with_context()
    state, _ = fedq.run_round(grid, at_random(fedq))
    current = fedq._begin(grid, state)
    fedq._finish(current, grid.send_and_receive(current.messages))
    assert current.report.replies == len(current.context.offered) == 20
    assert list(current.context._moved) == [1]
