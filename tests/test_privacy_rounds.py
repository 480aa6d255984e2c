"""Privacy in whole rounds: what clients send, what the server adds, states and budgets."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedq import Layout, build, config, simulation, wire
from fedq.client import Client, SimulatedSite, Task
from fedq.codecs.base import decode
from fedq.codecs.identity import Identity
from fedq.errors import ConfigError, DecodeError
from fedq.node import DeviceSite
from fedq.privacy._clip import norm
from fedq.privacy.base import SEEDED
from fedq.records import unpack
from fedq.results import read_rounds
from fedq.strategy import FedQ
from fedq.training import trainer_for
from tests.grids import Handler, InlineGrid, envelope, raw_reply

# isort: split
from flwr.app import Error, Message, RecordDict

D = 2000
LAYOUT = Layout.flat(D)
ZERO = np.zeros(D, np.float32)
CENTRAL = ("gaussian", "adaptive_gaussian")
DISTRIBUTED = ("discrete_gaussian", "skellam", "poisson_binomial")
OPTIONS: dict[str, dict[str, Any]] = {"poisson_binomial": {"levels": 8}}


def mechanism(name: str, **options: Any) -> Any:
    return build("privacy", name, **{"noise_multiplier": 1.0, **OPTIONS.get(name, {}), **options})


def strategy(privacy: Any, **options: Any) -> FedQ:
    return FedQ(layout=LAYOUT, **{"codec": Identity(), "privacy": privacy, **options})


def sends(scale: float = 1.0) -> Handler:
    """Client i answers with a vector of norm scale (i + 1) in a direction of its own."""

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        return task.reply(scale * vector(partition), examples=partition + 1, client=partition)

    return handle


def vector(partition: int) -> np.ndarray:
    x = np.random.default_rng(partition).normal(size=D)
    return (x * (partition + 1) / np.linalg.norm(x)).astype(np.float32)


def parts(message: Message) -> wire.Envelope:
    return wire.unseal(unpack(message.content))


# --- what is released ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CENTRAL, *DISTRIBUTED])
def test_a_round_releases_the_clipped_mean_with_the_stated_noise(name: str) -> None:
    n, clip = 10, 2.5
    fedq = strategy(mechanism(name, clip=clip), weighting="examples")
    after, report = fedq.run_round(InlineGrid(sends(), n), fedq.initial(ZERO))
    lengths = np.minimum(np.arange(1, n + 1), clip) / np.arange(1, n + 1)
    truth = sum(s * vector(i) for i, s in enumerate(lengths)) / n
    spread = clip / n * {"adaptive_gaussian": 0.9**-0.5}.get(name, 1.0)
    noise = (after.weights - truth) / spread
    assert 0.93 < noise.std() < 1.08
    if name != "poisson_binomial":  # whose noise is binomial
        assert stats.kstest(noise / noise.std(), "norm").pvalue > 1e-4
    assert report.rejected == {}
    assert report.privacy is not None
    assert report.privacy["releases"] == 1


@pytest.mark.parametrize("name", CENTRAL)
def test_clients_clip_before_the_codec(name: str) -> None:
    replies = []

    def handle(message: Message, partition: int) -> Message:
        replies.append(sends()(message, partition))
        return replies[-1]

    fedq = strategy(mechanism(name, clip=2.5))
    fedq.run_round(InlineGrid(handle, 5), fedq.initial(ZERO))
    norms = [norm(decode(parts(reply).parts[0], LAYOUT)) for reply in replies]
    np.testing.assert_allclose(norms, [1, 2, 2.5, 2.5, 2.5], rtol=1e-5)
    assert max(norms) <= 2.5


def test_the_server_clips_what_it_decodes() -> None:
    """A client that does not clip gains nothing, nor does a code that lengthens."""

    def hostile(message: Message, partition: int) -> Message:
        task = dataclasses.replace(Task.open(message, LAYOUT), privacy=build("privacy", "none"))
        return task.reply(100 * vector(3), examples=9999, client=partition)

    fedq = strategy(mechanism("gaussian", clip=1.0, noise_multiplier=1e-3))
    after, report = fedq.run_round(InlineGrid(hostile, 4), fedq.initial(ZERO))
    assert report.replies == 4
    assert norm(after.weights) < 1.01


@pytest.mark.parametrize("name", [*CENTRAL, *DISTRIBUTED])
def test_replies_say_nothing_that_has_no_noise(name: str) -> None:
    state_layout, said = Layout.flat(3), []

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT, state_layout)
        state = np.full(3, 7.0, np.float32)
        reply = task.reply(
            vector(partition), examples=50 + partition, client=partition, loss=1.5, state=state
        )
        said.append(parts(reply))
        return reply

    fedq = strategy(mechanism(name), state_layout=state_layout)
    before = fedq.initial(ZERO, np.arange(3, dtype=np.float32))
    after, report = fedq.run_round(InlineGrid(handle, 4), before)
    for one in said:
        assert set(one.metadata) <= {"round", "client", "examples", "within", "kept"}
        assert one.metadata["examples"] == 1
        np.testing.assert_array_equal(decode(one.parts[1], state_layout), before.state)
    np.testing.assert_array_equal(after.state, before.state)
    assert report.train_loss is None


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_codes_are_packed(name: str) -> None:
    said = []

    def handle(message: Message, partition: int) -> Message:
        reply = sends()(message, partition)
        said.append(parts(reply))
        return reply

    fedq = strategy(mechanism(name))
    fedq.run_round(InlineGrid(handle, 4), fedq.initial(ZERO))
    bits = 4 if name == "poisson_binomial" else 16
    assert {len(one.parts[0]) for one in said} == {D * bits // 8}


def test_the_request_carries_the_bound_of_its_round() -> None:
    grid = InlineGrid(sends(0.01), 5)
    fedq = strategy(mechanism("adaptive_gaussian", clip=3.0))
    state = fedq.initial(ZERO)
    clips = []
    for _ in range(3):
        clips.append(state.privacy.clip)
        state, _ = fedq.run_round(grid, state)
        assert parts(grid.seen[-1]).metadata["privacy"]["clip"] == clips[-1]
        assert parts(grid.seen[-1]).metadata["cohort"] == 5
    assert clips[0] == 3.0
    assert len(set(clips)) == 3


def test_noise_is_fresh_and_secret_unless_seeded() -> None:
    for name in ("gaussian", "skellam"):
        for seeded in (False, True):
            fedq = strategy(mechanism(name, seeded=seeded))
            runs = [
                fedq.run_round(InlineGrid(sends(), 3), fedq.initial(ZERO))[0].weights
                for _ in range(2)
            ]
            assert (runs[0].tobytes() == runs[1].tobytes()) is seeded
            if seeded:
                two, _ = fedq.run_round(InlineGrid(sends(), 3), fedq.initial(ZERO))
                more, _ = fedq.run_round(InlineGrid(sends(), 3), two)
                first, second = two.weights, more.weights - two.weights
                assert np.corrcoef(first, second)[0, 1] < 0.9  # another round, other noise


@pytest.mark.parametrize("name", [*CENTRAL, *DISTRIBUTED])
def test_the_order_of_replies_does_not_matter(name: str) -> None:
    results = []
    for order in (list, lambda m: m[::-1]):
        fedq = strategy(mechanism(name, seeded=True))
        after, report = fedq.run_round(InlineGrid(sends(), 6, order), fedq.initial(ZERO))
        results.append((after.weights.tobytes(), after.privacy.clip, report.privacy))
    assert results[0] == results[1]


# --- adaptive clipping ---------------------------------------------------------------------------


@pytest.mark.parametrize(("quantile", "start"), [(0.5, 0.05), (0.5, 50.0), (0.8, 1.0)])
def test_the_bound_converges_to_the_quantile(quantile: float, start: float) -> None:
    n, rng = 30, np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 0.5, n))

    def handle(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        x = vector(partition) / (partition + 1) * norms[partition]
        return task.reply(x.astype(np.float32), examples=1, client=partition)

    privacy = mechanism(
        "adaptive_gaussian", clip=start, quantile=quantile, noise_multiplier=0.5, seeded=True
    )
    fedq = strategy(privacy)
    grid, state, clips = InlineGrid(handle, n), fedq.initial(ZERO), []
    for _ in range(60):
        state, _ = fedq.run_round(grid, state)
        clips.append(state.privacy.clip)
    share = np.mean(norms <= np.exp(np.mean(np.log(clips[-20:]))))
    assert abs(share - quantile) < 0.1


def test_too_many_unclipped_updates_shrink_the_bound() -> None:
    """The sign of Andrew et al.: against all norms of 1, C = 10 falls and C = 0.1 grows."""
    for start, falls in ((10.0, True), (0.1, False)):
        privacy = mechanism("adaptive_gaussian", clip=start, noise_multiplier=0.1)
        fedq = strategy(privacy)

        def handle(message: Message, partition: int) -> Message:
            x = vector(partition) / np.float32(partition + 1)
            return Task.open(message, LAYOUT).reply(x, examples=1, client=partition)

        state, _ = fedq.run_round(InlineGrid(handle, 10), fedq.initial(ZERO))
        assert (state.privacy.clip < start) is falls


# --- hostile replies -----------------------------------------------------------------------------


def hostile(kind: str, message: Message, good: Message) -> Message:
    said = parts(good)
    codes, state, meta = bytes(said.parts[0]), bytes(said.parts[1]), dict(said.metadata)
    if kind == "short":
        return raw_reply(message, envelope(meta, codes[:-1], state))
    if kind == "long":
        return raw_reply(message, envelope(meta, codes + b"\0", state))
    if kind == "empty":
        return raw_reply(message, envelope(meta, b"", state))
    if kind == "too large":
        return raw_reply(message, envelope(meta, b"\xff" * len(codes), state))
    if kind == "a codec's frame":
        return raw_reply(message, envelope(meta, Identity().encode(ZERO, LAYOUT), state))
    if kind == "a bit that nobody asked for":
        return raw_reply(message, envelope({**meta, "within": True}, codes, state))
    if kind == "no client":
        return raw_reply(message, envelope({**meta, "client": None}, codes, state))
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("short", "long", "empty", "too large", "a codec's frame", "no client"),
        "a bit that nobody asked for",
    ],
)
def test_a_bad_payload_of_codes_costs_its_sender_only(kind: str) -> None:
    def handle(message: Message, partition: int) -> Message:
        good = sends(0.1)(message, partition)
        return hostile(kind, message, good) if partition == 1 else good

    fedq = strategy(mechanism("poisson_binomial", noise_multiplier=2.0))
    after, report = fedq.run_round(InlineGrid(handle, 4), fedq.initial(ZERO))
    assert report.rejected == {"malformed": 1}
    assert after.privacy.ledger.clients.tolist() == [0, 2, 3]


@pytest.mark.parametrize("within", [None, 1, "yes"])
def test_a_missing_bit_is_malformed(within: object) -> None:
    def handle(message: Message, partition: int) -> Message:
        good = parts(sends()(message, partition))
        meta = {**good.metadata, "within": within} if partition == 1 else dict(good.metadata)
        return raw_reply(message, envelope(meta, *map(bytes, good.parts)))

    fedq = strategy(mechanism("adaptive_gaussian"))
    _, report = fedq.run_round(InlineGrid(handle, 4), fedq.initial(ZERO))
    assert report.rejected == {"malformed": 1}


@pytest.mark.parametrize("name", ["gaussian", *DISTRIBUTED])
def test_dropouts_shrink_the_step_and_cost_what_they_must(name: str) -> None:
    def handle(message: Message, partition: int) -> Message:
        if partition >= 6:
            return Message(Error(2, "battery is empty"), reply_to=message)
        return sends()(message, partition)

    fedq = strategy(mechanism(name, clip=0.5, noise_multiplier=1.0))
    whole, _ = fedq.run_round(InlineGrid(sends(), 10), fedq.initial(ZERO))
    after, report = fedq.run_round(InlineGrid(handle, 10), fedq.initial(ZERO))
    assert report.privacy is not None
    assert whole.privacy is not None
    full, partial = fedq.privacy.report(whole.privacy)["epsilon"], report.privacy["epsilon"]
    truth = sum(vector(i) / (i + 1) * 0.5 for i in range(6)) / 10
    spread = (after.weights - truth).std() * 10 / 0.5
    if name == "gaussian":
        assert partial == full
        assert 0.93 < spread < 1.08
    else:
        assert partial > 1.2 * full
        assert spread == pytest.approx(math.sqrt(0.6), rel=0.08)


def test_a_round_without_a_quorum_releases_and_costs_nothing() -> None:
    def handle(message: Message, partition: int) -> Message:
        if partition:
            return Message(Error(2, "battery is empty"), reply_to=message)
        return sends()(message, partition)

    fedq = strategy(mechanism("skellam"))
    after, report = fedq.run_round(InlineGrid(handle, 4), fedq.initial(ZERO))
    assert report.skipped
    assert after.weights is ZERO
    assert report.privacy is not None
    assert report.privacy["epsilon"] == 0


# --- a hostile server ----------------------------------------------------------------------------


def request(**changes: Any) -> Message:
    trainer = trainer_for({"name": "mlp"}, {"name": "none"}, [4], 2)
    privacy = mechanism("gaussian", seeded=True)
    task = {
        "model": {"name": "mlp"},
        "quantization": {"name": "none"},
        "input_shape": [4],
        "classes": 2,
        "training": {},
    }
    fedq = FedQ(layout=trainer.layout, codec=Identity(), privacy=privacy, task=task)
    grid = InlineGrid(lambda message, partition: raw_reply(message, b""), 2)
    fedq.run_round(grid, fedq.initial(trainer.weights()))
    said = parts(grid.seen[0])
    content = raw_reply(grid.seen[0], envelope({**said.metadata, **changes}, *said.parts)).content
    message = grid.seen[0]
    return Message(content, message.metadata.dst_node_id, "train")


@dataclasses.dataclass(frozen=True)
class Device(DeviceSite):
    """A device with four rows in memory."""

    def examples(self, context: object) -> tuple[np.ndarray, np.ndarray]:
        return np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])


@pytest.mark.parametrize("simulated", [True, False])
def test_a_device_refuses_noise_that_is_no_secret(simulated: bool, tmp_path: Path) -> None:
    site: Any = Device(None, tmp_path)
    if simulated:
        site = dataclasses.replace(site)
        object.__setattr__(site, "simulated", True)
    context: Any = SimpleNamespace(node_config={"partition-id": 0}, node_id=1)
    message = request()
    message.metadata.__dict__["_message_id"] = "1"
    said = parts(Client(site).train(message, context)).metadata
    assert ("dropped" in said) is not simulated
    if not simulated:
        assert "seeded" in said["dropped"]
    assert SimulatedSite.simulated
    assert not DeviceSite.simulated


def test_a_request_for_an_unknown_mechanism_is_refused() -> None:
    grid = InlineGrid(sends(), 2)
    fedq = strategy(mechanism("gaussian"))
    fedq.run_round(grid, fedq.initial(ZERO))
    said = parts(grid.seen[0])
    for bad in ({"name": "magic"}, {"name": "gaussian", "noise_multiplier": -1.0}):
        blob = envelope({**said.metadata, "privacy": bad}, *said.parts)
        content = raw_reply(grid.seen[0], blob).content
        with pytest.raises((ConfigError, DecodeError)):
            Task.open(Message(RecordDict(dict(content)), 2, "train"), LAYOUT)


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
)


def run(path: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    experiment = config.load([*SMALL, *overrides])
    return simulation.run_experiment(experiment, path, resume=resume).summary


@pytest.mark.parametrize(
    "privacy",
    [
        ("privacy=adaptive_gaussian", "privacy.noise_multiplier=0.5"),
        ("privacy=skellam", "privacy.epsilon=20"),
    ],
)
def test_resumed_is_equal_to_uninterrupted(privacy: tuple[str, ...], tmp_path: Path) -> None:
    options = (*privacy, "privacy.seeded=true")
    whole = run(tmp_path / "whole", *options, "rounds=4")
    if privacy[0].endswith("skellam"):  # calibrated at the start, for two rounds only
        options = (*options, f"privacy.noise_multiplier={whole['privacy']['noise_multiplier']!r}")
    run(tmp_path / "cut", *options, "rounds=2")
    again = run(tmp_path / "cut", *options, "rounds=4", resume=True)
    assert again["model_sha256"] == whole["model_sha256"]
    assert again["privacy"] == whole["privacy"]
    lines = [[r.get("privacy") for r in read_rounds(tmp_path / d)] for d in ("whole", "cut")]
    assert lines[0] == lines[1]
    assert whole["privacy"]["caveats"] == [SEEDED]


@pytest.mark.parametrize(
    "privacy",
    [
        ("privacy=gaussian", "privacy.noise_multiplier=1"),
        ("privacy=discrete_gaussian", "privacy.noise_multiplier=1"),
        ("privacy=example_gaussian", "privacy.noise_multiplier=1", "quantization=none"),
    ],
)
def test_a_budget_stops_the_run_before_it_is_exceeded(
    privacy: tuple[str, ...], tmp_path: Path
) -> None:
    budget = 7.0
    said = run(tmp_path / "run", *privacy, f"privacy.epsilon={budget}", "rounds=30")
    stated = said["privacy"]
    assert 0.4 * budget < stated["epsilon"] <= budget
    assert said["rounds"] < 30
    assert "privacy budget" in said["stopped"]
    assert said["accuracy"] is not None
    running = read_rounds(tmp_path / "run")[1:]
    epsilons = [record["privacy"]["epsilon"] for record in running]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == stated["epsilon"]


def test_a_calibrated_run_does_all_its_rounds(tmp_path: Path) -> None:
    said = run(tmp_path / "run", "privacy=gaussian", "privacy.epsilon=6", "rounds=5")
    assert said["rounds"] == 5
    assert "stopped" not in said
    assert 0.9 * 6 < said["privacy"]["epsilon"] <= 6


def test_a_budget_without_room_for_a_round_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not allow a single round"):
        run(
            tmp_path / "run",
            *("privacy=gaussian", "privacy.noise_multiplier=0.5", "privacy.epsilon=0.1"),
        )


def test_a_summary_can_stand_alone(tmp_path: Path) -> None:
    said = run(
        tmp_path / "run",
        *("privacy=gaussian", "privacy.noise_multiplier=0.5", "privacy.delta=0.1", "rounds=1"),
    )["privacy"]
    for key in ("epsilon", "delta", "unit", "mechanism", "relation", "against", "assumptions"):
        assert said[key], key
    assert said["unit"] == "client"
    assert any("1 / 10 clients" in caveat for caveat in said["caveats"])
    assert SEEDED not in said["caveats"]


@pytest.mark.parametrize("codec", ["dithered", "uniform"])
def test_nothing_is_stated_of_rounding_alone(codec: str, tmp_path: Path) -> None:
    said = run(tmp_path / "run", f"codec={codec}", "rounds=1")
    text = json.dumps(said) + (tmp_path / "run" / "rounds.jsonl").read_text()
    assert "epsilon" not in text
    assert "privacy" not in text


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan"])
@pytest.mark.parametrize("option", ["epsilon", "noise_multiplier", "clip"])
@pytest.mark.parametrize("name", ["gaussian", "skellam", "example_gaussian"])
def test_numbers_that_make_no_sense_are_named(name: str, option: str, value: str) -> None:
    base = [f"privacy={name}"]
    if option != "noise_multiplier":
        base.append("privacy.noise_multiplier=1")
    with pytest.raises(ConfigError, match=rf"privacy\.{option} must be finite and positive.*;"):
        config.load([*base, "quantization=none", f"privacy.{option}={value}"])


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "inf", "nan"])
def test_a_delta_that_makes_no_sense_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"privacy.delta must be in .0, 1.*one over the number"):
        config.load(["privacy=gaussian", "privacy.epsilon=1", f"privacy.delta={value}"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["privacy=gaussian"], "needs privacy.noise_multiplier"),
        (["privacy=example_gaussian", "privacy.epsilon=3"], "needs privacy.noise_multiplier"),
        (["privacy=skellam", "privacy.epsilon=3", "privacy.bits=1"], "bits must be from 2"),
        (["privacy=skellam", "privacy.epsilon=3", "privacy.bits=17"], "bits must be from 2"),
        (["privacy=poisson_binomial", "privacy.epsilon=3", "privacy.levels=0"], "levels must be"),
        (["privacy=gaussian", "privacy.epsilon=3", "aggregator=median"], "aggregator=mean"),
        (["privacy=gaussian", "privacy.epsilon=3", "clients_per_round=1"], "cohort of one"),
        (["privacy=example_gaussian", "privacy.noise_multiplier=1"], "quantization=none"),
        (
            ["privacy=adaptive_gaussian", "privacy.epsilon=3", "privacy.quantile=1.5"],
            "quantile must be",
        ),
        (["privacy=adaptive_gaussian", "privacy.epsilon=3", "privacy.rate=0"], "rate must be"),
    ],
)
def test_what_guarantees_nothing_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(overrides)


def test_a_cohort_of_one_is_refused_when_it_turns_out_so() -> None:
    fedq = strategy(mechanism("gaussian"), clients_per_round=0.01)
    with pytest.raises(ConfigError, match="cohort of one"):
        fedq.run_round(InlineGrid(sends(), 5), fedq.initial(ZERO))


def test_mechanisms_are_their_configuration() -> None:
    from fedq import registry

    for name, cls in registry.table("privacy").items():
        for options in cls.examples:  # type: ignore[attr-defined]
            privacy = build("privacy", name, **options)
            assert registry.from_config("privacy", registry.to_config(privacy)) == privacy


def test_a_report_states_what_the_summary_states(tmp_path: Path) -> None:
    from fedq.report import report
    from fedq.report.runs import load_run
    from fedq.report.tables import note

    run(tmp_path / "run", "privacy=gaussian", "privacy.epsilon=5", "rounds=1")
    assert "epsilon 5 at delta 1e-05 per client (gaussian)" in note([load_run(tmp_path / "run")])
    assert report([tmp_path / "run"])
