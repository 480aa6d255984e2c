"""Trees of aggregators: exact sums are a star's to the bit, and a codec's error is what is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedq import Layout, build, config, simulation, wire
from fedq.aggregators.mean import MeanStream
from fedq.client import Task
from fedq.codecs.identity import Identity
from fedq.errors import ConfigError, DecodeError
from fedq.random import derive, generator, round_seed
from fedq.records import unpack
from fedq.rounds import RoundReport, ServerState
from fedq.strategy import FedQ
from fedq.topologies.tree import Tree
from tests.grids import InlineGrid

# isort: split
from flwr.app import Message

LAYOUT, STATE = Layout.flat(300), Layout.flat(5)
ZERO = np.zeros(LAYOUT.size, np.float32)
CLIENTS = 13

updates = st.integers(0, 6).flatmap(
    lambda d: st.lists(
        st.tuples(
            hnp.arrays(
                np.float32,
                d,
                elements=st.floats(-(2.0**14), 2.0**14, width=32)
                | st.floats(-(2.0**-20), 2.0**-20, width=32),
            ),
            st.integers(0, 10_000) | st.floats(0.001, 1e6),
        ),
        min_size=1,
        max_size=8,
    )
)


def summed(added) -> MeanStream:
    stream = MeanStream(added[0][0].size)
    for update, weight in added:
        stream.add(update, weight)
    return stream


def same(a: MeanStream, b: MeanStream) -> bool:
    words = (np.array_equal(a._high, b._high), np.array_equal(a._low, b._low))
    return all(words) and (a.count, a.units) == (b.count, b.units)


@given(added=updates)
def test_sums_cross_the_wire_exactly(added) -> None:
    stream = summed(added)
    assert same(MeanStream.load(stream.dump(), added[0][0].size), stream)


@given(
    update=hnp.arrays(np.float32, 4, elements=st.floats(-(2.0**14), 2.0**14, width=32)),
    weights=st.lists(st.integers(1, 2**20 - 1), min_size=1, max_size=6),
)
def test_a_mean_weighs_as_its_updates(update, weights: list[int]) -> None:
    one, apart = MeanStream(4), summed([(update, weight) for weight in weights])
    one.add_mean(update, apart.units, len(weights))
    assert same(one, apart)


def test_malformed_sums_are_refused() -> None:
    good = summed([(np.array([1.5, -2.0], np.float32), 3)]).dump()
    assert len(good) == len(wire.varint(1) + wire.varint(3 << 10)) + 2 + 2 * (good[4] - good[3])
    forged = wire.varint(1) + wire.varint(1) + bytes([0, 16]) + b"\x7f" * 32
    cases = [good[:-1], good + b"\0", b"", good[:3] + bytes([4, 4]), good[:3] + bytes([0, 17])]
    cases += [wire.varint(1) + wire.varint(1 << 40) + good[3:], forged]
    for bad in cases:
        with pytest.raises(DecodeError):
            MeanStream.load(bad, 2)
    stream = MeanStream(2)
    for mean, units, count in [
        (np.zeros(2, np.float32), 0, 1),
        (np.zeros(2, np.float32), 1 << 40, 1),
        (np.full(2, 2.0**16, np.float32), 9, 1),
        (np.zeros(3, np.float32), 9, 1),
    ]:
        with pytest.raises(ConfigError):
            stream.add_mean(mean, units, count)


def delta_of(partition: int) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(derive(3, partition))
    scale = 10.0 ** rng.integers(-5, 1, LAYOUT.size)
    drawn = rng.normal(size=LAYOUT.size) * scale, rng.normal(size=STATE.size)
    return drawn[0].astype(np.float32), drawn[1].astype(np.float32)


def client(message: Message, partition: int) -> Message:
    task = Task.open(message, LAYOUT, STATE)
    delta, state = delta_of(partition)
    return task.reply(delta, examples=7 * partition + 1, client=partition, state=state)


def run(**options: object) -> tuple[ServerState, RoundReport, InlineGrid]:
    grid = InlineGrid(client, CLIENTS)
    fedq = FedQ(layout=LAYOUT, state_layout=STATE, codec=Identity(), **options)  # type: ignore[arg-type]
    after, report = fedq.run_round(grid, fedq.initial(ZERO))
    return after, report, grid


@pytest.mark.parametrize("edges", [1, 4, CLIENTS, 500])
@pytest.mark.parametrize("cohort", [CLIENTS, 5])
def test_exact_sums_are_those_of_a_star_to_the_bit(edges: int, cohort: int) -> None:
    star, flat, _ = run(clients_per_round=cohort)
    tree, report, _ = run(clients_per_round=cohort, topology=Tree(edges=edges), threads=3)
    assert tree.weights.tobytes() == star.weights.tobytes()
    assert tree.state.tobytes() == star.state.tobytes()
    assert report.edge_nmse == 0
    assert flat.edge_nmse is flat.edge_uplink_bytes is flat.edge_downlink_bytes is None
    assert (report.uplink_bytes, report.replies) == (flat.uplink_bytes, flat.replies)


@pytest.mark.parametrize(
    "codec",
    [
        build("codec", "identity"),
        build("codec", "uniform", bits=8, rounding="dithered"),
        build("codec", "correlated"),
    ],
    ids=lambda codec: codec.name,
)
def test_the_error_of_the_second_hop_is_the_one_that_is_reported(codec) -> None:
    edges = 4
    star, _, _ = run()
    after, report, _ = run(topology=Tree(edges=edges, codec=codec))
    served = np.arange(CLIENTS) * edges // CLIENTS
    weights = 7.0 * np.arange(CLIENTS) + 1
    mean = np.zeros(LAYOUT.size)
    for edge in range(edges):
        members = np.flatnonzero(served == edge)
        stream = summed([(delta_of(i)[0], weights[i]) for i in members])
        seed = codec.client_seed(round_seed(derive(0, "edges"), 1), edge)
        payload = codec.encode(stream.result(), LAYOUT, seed)
        mean += stream.weight * codec.decode(payload, LAYOUT).astype(np.float64)
    mean /= weights.sum()
    np.testing.assert_allclose(after.weights, mean, rtol=1e-6, atol=1e-12)
    exact = star.weights.astype(np.float64)
    nmse = np.sum((mean - exact) ** 2) / np.sum(exact**2)
    assert report.edge_nmse == pytest.approx(nmse, rel=1e-3, abs=1e-13)
    assert after.state.tobytes() == star.state.tobytes()


def test_both_hops_are_lengths_of_bytes() -> None:
    edges = 4
    codec = build("codec", "uniform", bits=4)
    _, exact, grid = run(topology=Tree(edges=edges))
    _, coded, _ = run(topology=Tree(edges=edges, codec=codec))
    (request,) = {unpack(message.content) for message in grid.seen}
    assert exact.edge_downlink_bytes == coded.edge_downlink_bytes == edges * len(request)
    assert exact.downlink_bytes == CLIENTS * len(request)
    assert exact.uplink_bytes == coded.uplink_bytes
    assert exact.edge_uplink_bytes is not None
    assert coded.edge_uplink_bytes is not None
    # Sums of a range of 2**40 in units that drop what is zero, and at most 16 bytes each.
    assert 4 < exact.edge_uplink_bytes / (edges * LAYOUT.size) < 16
    body = codec.encode(delta_of(0)[0], LAYOUT, 0)
    assert coded.edge_uplink_bytes < edges * (len(body) + STATE.size * 16 + 150)


def test_a_client_that_fails_costs_its_edge_nothing() -> None:
    def failing(message: Message, partition: int) -> Message:
        if partition % 3 == 0:
            return Task.open(message, LAYOUT, STATE).drop("no data")
        return client(message, partition)

    results = []
    for options in ({}, {"topology": Tree(edges=CLIENTS)}):
        fedq = FedQ(layout=LAYOUT, state_layout=STATE, codec=Identity(), **options)
        after, report = fedq.run_round(InlineGrid(failing, CLIENTS), fedq.initial(ZERO))
        assert report.rejected["dropped"] == 5
        results.append(after.weights.tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["aggregator=median"], "needs aggregator=mean"),
        (["aggregator=norm_bounded"], "needs aggregator=mean"),
        (["sealed=true"], "sealed=false and secure_aggregation=none"),
        (["secure_aggregation=secagg"], "sealed=false and secure_aggregation=none"),
        (["privacy=gaussian", "privacy.noise_multiplier=1"], "needs privacy=none"),
        (["fleet=pi_shelf", "pacing=fedbuff"], "needs pacing=synchronous"),
        (["topology.edges=0"], "topology.edges must be 1 to"),
        (["topology.codec=error_feedback", "topology.codec.inner=top_k"], "keeps a residual"),
    ],
)
def test_what_does_not_compose_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(["topology=tree", *overrides])


def test_a_run_says_what_its_edges_sent(tmp_path: Path) -> None:
    small = ["data=digits", "clients=8", "clients_per_round=6", "local_epochs=1", "rounds=2"]
    small += ["baseline=false", "engine.workers=1", "model=mlp", "model.hidden=[8]"]
    digests, records = [], []
    for place in (["topology=star"], ["topology=tree"], ["topology=tree", "topology.codec=qsgd"]):
        path = tmp_path / str(len(digests))
        (done,) = simulation.simulate(config.load([*small, *place, f"run_dir={path}"]))
        digests.append(done.summary["model_sha256"])
        lines = (path / "rounds.jsonl").read_text().splitlines()
        records.append([json.loads(line) for line in lines][1:])
        for key in ("edge_uplink_bytes", "edge_downlink_bytes"):
            assert (key in done.summary) == (place[0] == "topology=tree")
            if key in done.summary:
                assert done.summary[key] == sum(record[key] for record in records[-1]) > 0
    assert digests[0] == digests[1] != digests[2]
    assert not any("edge_nmse" in record for record in records[0])
    assert [record["edge_nmse"] for record in records[1]] == [0, 0]
    assert all(0 < record["edge_nmse"] < 10 for record in records[2])
