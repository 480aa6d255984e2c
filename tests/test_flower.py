"""Flower's own strategies with encoded updates: what they see is what they would have seen."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedq import build, records, wire
from fedq.errors import ConfigError, DecodeError
from fedq.flower import RESIDUAL, CompressedStrategy, compression_mod
from fedq.layout import Layout
from tests.grids import InlineGrid

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy

CLIENTS, SHAPES = 5, {"w": (40, 30), "b": (30,), "gain": (), "half": (8,)}
LAYOUT = Layout(tuple(SHAPES), tuple(SHAPES.values()))


def arrays(seed: int) -> ArrayRecord:
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return ArrayRecord(
        {
            "w": Array(values["w"]),
            "count": Array(np.array(seed, np.int64)),
            "b": Array(values["b"].astype(np.float64)),
            "gain": Array(np.asarray(values["gain"])),
            "half": Array(values["half"].astype(np.float16)),
        }
    )


def train(message: Message, context: Context) -> Message:
    """An app that knows nothing of fedq: it adds its own number's noise."""
    if message.metadata.message_type == "evaluate":
        start = message.content.array_records["arrays"]["w"].numpy()
        metrics = MetricRecord({"mean": float(start.mean()), "num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
    node = message.metadata.dst_node_id
    start = message.content.array_records["arrays"]
    assert list(start) == ["w", "count", "b", "gain", "half"]
    trained = ArrayRecord()
    for i, (name, array) in enumerate(start.items()):
        value = array.numpy()
        noise = np.random.default_rng([node, i]).normal(0, 0.1, value.shape)
        value = value + (1 if name == "count" else noise)
        trained[name] = Array(np.asarray(value, array.dtype))
    metrics = MetricRecord({"loss": float(node), "num-examples": node})
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)


Tamper = Callable[[Message], Message]


@dataclass
class App:
    """Nodes that run :func:`train` with the mod, each with a state of its own."""

    mod: bool = True
    tamper: Tamper | None = None
    contexts: dict[int, Context] = field(default_factory=dict)

    def __call__(self, message: Message, client: int) -> Message:
        node = message.metadata.dst_node_id
        context = self.contexts.setdefault(node, Context(1, node, {}, RecordDict(), {}))
        reply = compression_mod(message, context, train) if self.mod else train(message, context)
        return self.tamper(reply) if self.tamper and client == 1 else reply


def run(strategy: Strategy, app: App, rounds: int = 1, start: ArrayRecord | None = None) -> Any:
    grid = InlineGrid(app, CLIENTS)
    return strategy.start(grid, start or arrays(0), num_rounds=rounds)


def fedavg(**options: Any) -> FedAvg:
    return FedAvg(min_train_nodes=CLIENTS, fraction_evaluate=0.0, **options)


def values(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


@pytest.mark.parametrize(
    "make",
    [
        fedavg,
        lambda: FedAdam(fraction_evaluate=0.0, min_train_nodes=CLIENTS),
        lambda: FedMedian(fraction_evaluate=0.0, min_train_nodes=CLIENTS),
        lambda: Krum(fraction_evaluate=0.0, min_train_nodes=CLIENTS, num_malicious_nodes=1),
    ],
)
def test_exact_updates_change_no_strategy(make: Callable[[], Strategy]) -> None:
    plain = run(make(), App(mod=False), rounds=2)
    strategy = CompressedStrategy(make(), codec="identity")
    found = run(strategy, App(), rounds=2)
    for name, value in values(plain.arrays).items():
        other = found.arrays[name].numpy()
        assert (other.dtype, other.shape) == (arrays(0)[name].numpy().dtype, value.shape)
        tolerance = 1e-2 if name == "half" else 1e-5  # Flower adds in half precision, too
        if name != "count":
            np.testing.assert_allclose(other, value, atol=tolerance)
    assert found.train_metrics_clientapp == plain.train_metrics_clientapp


def test_counters_stay_counters() -> None:
    found = run(CompressedStrategy(fedavg(), codec="sign"), App(), rounds=3)
    assert found.arrays["count"].numpy() == np.array(3, np.int64)
    assert found.arrays["count"].dtype == "int64"


def test_codes_are_short_and_their_bytes_are_counted() -> None:
    strategy = CompressedStrategy(fedavg(), codec=build("codec", "dtcq", bits=2.0))
    app = App()
    seen: list[int] = []

    def count(reply: Message) -> Message:
        seen.append(len(records.unpack(reply.content)))
        return reply

    app.tamper = count
    run(strategy, app)
    traffic = strategy.traffic[1]
    assert (traffic.updates, traffic.rejected) == (CLIENTS, 0)
    counter = len(arrays(0)["count"].data)
    assert traffic.uplink_bytes == pytest.approx(CLIENTS * (seen[0] + counter), rel=0.05)
    assert traffic.uplink_bytes < LAYOUT.size * CLIENTS * 2.2 / 8 + CLIENTS * (counter + 80)
    assert traffic.float32_bytes == 2 * 4 * LAYOUT.size * CLIENTS


def test_same_seed_same_result() -> None:
    results = [
        run(CompressedStrategy(fedavg(), codec=build("codec", "qsgd"), seed=seed), App())
        for seed in (3, 3, 4)
    ]
    first, second, third = (values(result.arrays)["w"] for result in results)
    np.testing.assert_allclose(first, second, atol=1e-6)  # Flower's order of nodes is random
    assert np.abs(first - third).max() > 1e-3


def test_a_quantized_downlink_loses_nothing_for_good() -> None:
    """The server adds decoded changes to its exact model: with no training it does not move."""

    def idle(message: Message, context: Context) -> Message:
        reply = train(message, context)
        reply.content["arrays"] = message.content.array_records["arrays"]
        return reply

    contexts: dict[int, Context] = {}

    def app(message: Message, client: int) -> Message:
        context = contexts.setdefault(client, Context(1, client, {}, RecordDict(), {}))
        return compression_mod(message, context, idle)

    strategy = CompressedStrategy(fedavg(), codec="identity", downlink="bf16")
    start = arrays(0)
    result = strategy.start(InlineGrid(app, CLIENTS), start, num_rounds=3)
    for name in ("w", "b", "gain"):
        np.testing.assert_allclose(result.arrays[name].numpy(), start[name].numpy(), rtol=1e-6)
    assert strategy.traffic[1].downlink_bytes < CLIENTS * (2 * LAYOUT.size + 900)


def test_evaluation_gets_the_decoded_model() -> None:
    strategy = CompressedStrategy(
        FedAvg(min_train_nodes=CLIENTS, min_evaluate_nodes=CLIENTS), "identity", downlink="bf16"
    )
    result = run(strategy, App())
    expected = result.arrays["w"].numpy().mean()
    assert result.evaluate_metrics_clientapp[1]["mean"] == pytest.approx(expected, abs=1e-3)


def test_error_feedback_loses_nothing_for_good() -> None:
    """All that was decoded, and what is left in the nodes' states, is all that was trained."""
    codec = build("codec", "error_feedback", inner={"name": "top_k", "fraction": 0.1})
    app, rounds = App(), 4
    start = arrays(0)
    result = run(CompressedStrategy(fedavg(weighted_by_key="one"), codec), one_each(app), rounds)
    trained = LAYOUT.flatten({n: v for n, v in values(result.arrays).items() if n != "count"})
    begun = LAYOUT.flatten({n: v for n, v in values(start).items() if n != "count"})
    left = np.mean([c.state.array_records[RESIDUAL]["residual"].numpy() for c in states(app)], 0)
    plain = run(fedavg(weighted_by_key="one"), one_each(App(mod=False)), rounds)
    whole = LAYOUT.flatten({n: v for n, v in values(plain.arrays).items() if n != "count"})
    exact = LAYOUT.tensors[3].start  # half precision rounds what is decoded
    np.testing.assert_allclose((trained - begun + left)[:exact], (whole - begun)[:exact], atol=1e-5)
    assert np.abs(trained - whole).max() > 0.05


def one_each(app: App) -> Any:
    def handle(message: Message, client: int) -> Message:
        reply = app(message, client)
        reply.content["metrics"] = MetricRecord({"one": 1})
        return reply

    return handle


def states(app: App) -> list[Context]:
    return list(app.contexts.values())


def payload_of(reply: Message) -> bytes:
    return bytes(wire.unseal(records.unpack(reply.content)).parts[0])


def replaced(reply: Message, *parts: bytes, **metadata: Any) -> Message:
    blob = wire.seal(wire.Envelope({"arrays": "arrays", **metadata}, parts))
    content = {k: v for k, v in reply.content.items() if k != records.KEY}
    reply.content = RecordDict({**content, **records.pack(blob)})
    return reply


def with_counter(reply: Message, array: Array | None) -> Message:
    reply.content["arrays"] = ArrayRecord({} if array is None else {"count": array})
    return reply


def of_another_round(reply: Message) -> Message:
    codec = build("codec", "uniform", bits=4)
    return replaced(reply, codec.encode(np.ones(LAYOUT.size), LAYOUT, 12345))


def of_another_codec(reply: Message) -> Message:
    seed = wire.open_frame(payload_of(reply), LAYOUT).seed
    return replaced(reply, build("codec", "identity").encode(np.ones(LAYOUT.size), LAYOUT, seed))


def of_another_layout(reply: Message) -> Message:
    return replaced(reply, build("codec", "uniform", bits=4).encode(np.ones(7), Layout.flat(7)))


LIES: dict[str, Tamper] = {
    "truncated": lambda reply: replaced(reply, payload_of(reply)[:-3]),
    "flipped": lambda reply: replaced(reply, bytes(255 - b for b in payload_of(reply))),
    "no part": replaced,
    "two parts": lambda reply: replaced(reply, payload_of(reply), b"more"),
    "no blob": lambda reply: with_blob(reply, b""),
    "another round": of_another_round,
    "another codec": of_another_codec,
    "another layout": of_another_layout,
    "no counter": lambda reply: with_counter(reply, None),
    "another counter": lambda reply: with_counter(reply, Array(np.zeros(9, np.int64))),
    "a lying counter": lambda reply: with_counter(
        reply, Array("int64", (), "numpy.ndarray", Array(np.zeros(9)).data)
    ),
    "a pickled counter": lambda reply: with_counter(
        reply, Array("int64", (), "numpy.ndarray", b"\x80\x04K\x01.")
    ),
    "a plain update": lambda reply: plain(reply),
}


def with_blob(reply: Message, blob: bytes) -> Message:
    reply.content[records.KEY] = ConfigRecord({"blob": blob})
    return reply


def plain(reply: Message) -> Message:
    reply.content = RecordDict({"arrays": arrays(1), "metrics": reply.content["metrics"]})
    return reply


@pytest.mark.parametrize("lie", LIES)
def test_a_bad_reply_loses_itself(lie: str) -> None:
    strategy = CompressedStrategy(fedavg(), build("codec", "uniform", bits=4))
    result = run(strategy, App(tamper=LIES[lie]))
    assert strategy.traffic[1].updates == CLIENTS - 1
    assert strategy.traffic[1].rejected == 1
    nodes = [node for node in range(2, 2 + CLIENTS) if node != 3]  # weighted by its own number
    loss = sum(node * node for node in nodes) / sum(nodes)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(loss)


def test_clients_without_the_mod_are_named() -> None:
    with pytest.raises(ConfigError, match="mods="):
        run(CompressedStrategy(fedavg(), "sign"), App(mod=False))


def test_a_server_without_the_strategy_is_served() -> None:
    plain_run = run(fedavg(), App(mod=False))
    found = run(fedavg(), App())
    for name, value in values(plain_run.arrays).items():
        tolerance = 1e-2 if name == "half" else 1e-6
        np.testing.assert_allclose(found.arrays[name].numpy(), value, atol=tolerance)


def request(**metadata: Any) -> Message:
    good = {"arrays": "arrays", "codec": {"name": "sign"}, "seed": 1}
    parts = [metadata.pop("part")] if "part" in metadata else []
    blob = wire.seal(wire.Envelope({**good, **metadata}, parts))
    return Message(RecordDict({"arrays": arrays(0), **records.pack(blob)}), 2, "train")


@pytest.mark.parametrize(
    "metadata",
    [
        {"codec": {"name": "os.system"}},
        {"codec": {"name": "top_k", "fraction": 2}},
        {"seed": "one"},
        {"arrays": "weights"},
        {"part": b"", "model": [["w", "float32", [2]]]},
        {"part": b"fq", "model": [["w", "float32", [-1]]]},
        {"part": b"fq", "model": [["w", "float32", [2**40]]]},
        {"part": b"fq", "model": [["w", "no type", [2]]]},
        {"part": b"fq", "model": 7},
        {"part": b"fq"},
    ],
)
def test_a_lying_server_is_refused(metadata: dict[str, Any]) -> None:
    context = Context(1, 2, {}, RecordDict(), {})
    with pytest.raises(DecodeError):
        compression_mod(request(**metadata), context, train)


def test_a_strategy_that_sends_two_models_is_refused() -> None:
    content = RecordDict({"arrays": arrays(0), "more": arrays(1)})
    strategy = CompressedStrategy(fedavg(), "sign")
    with pytest.raises(ConfigError, match="2 ArrayRecords"):
        strategy._with_task(content, 1)


def test_a_downlink_with_feedback_is_refused() -> None:
    downlink = build("codec", "error_feedback", inner="sign")
    with pytest.raises(ConfigError, match="exact model"):
        CompressedStrategy(fedavg(), "sign", downlink=downlink)


EXAMPLE = Path(__file__).parents[1] / "examples" / "flower_quickstart"


def test_the_quickstart_learns_with_a_fraction_of_the_bytes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    client_app = importlib.import_module("quickstart.client_app")
    server_app = importlib.import_module("quickstart.server_app")
    settings = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    config = settings["config"]
    contexts: dict[int, Context] = {}

    def node(message: Message, client: int) -> Message:
        own = {"partition-id": client, "num-partitions": 10}
        context = contexts.setdefault(client, Context(1, client, own, RecordDict(), config))
        return client_app.app(message, context)

    server_app.app(InlineGrid(node, 10), Context(1, 0, {}, RecordDict(), config))
    less = re.search(r"([\d.]+) times less", capsys.readouterr().out)
    assert less is not None
    assert float(less[1]) > 8
    accuracies = re.findall(r"MetricRecord: {'accuracy': ([\d.]+)}", caplog.text)
    assert float(accuracies[-1]) > 0.85
