"""Attacks: what hostile clients send is what the papers say, in real bytes, and always the same."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedq import ConfigError, DecodeError, Layout, available, build, wire
from fedq.attacks._backdoor import patch
from fedq.attacks._defence import Defence
from fedq.attacks.base import Accomplice, Attack, Honest, VectorAttack, View
from fedq.client import Task
from fedq.codecs import Codec, decode
from fedq.engines.adversary import Adversary
from fedq.random import generator
from fedq.records import unpack
from fedq.registry import from_config, lookup, to_config
from fedq.strategy import FedQ
from tests.grids import InlineGrid

# isort: split
from flwr.app import Message

LAYOUT = Layout(("w", "b"), ((10, 4), (10,)))
CODECS = [
    build("codec", "identity"),
    build("codec", "uniform", bits=4, rounding="dithered", scale="model"),
    build("codec", "error_feedback", inner="sign"),
]
CASES = [
    pytest.param(build("attack", name, **options), id=f"{name}-{options}")
    for name in available("attack")
    for options in lookup("attack", name).examples
]
HOSTILE = [case for case in CASES if case.values[0].name != "none"]
every = pytest.mark.parametrize("attack", CASES)
every_hostile = pytest.mark.parametrize("attack", HOSTILE)
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


CLIENT = Accomplice(place=0, of=2, classes=10, high=1.0, seed=5)


def rows(n: int, seed: int) -> NDArray[np.float64]:
    return 0.1 + np.random.default_rng(seed).normal(size=(n, LAYOUT.size)) * 0.05


def reply(codec: Codec, delta: NDArray[Any], client: int, server_round: int = 3) -> Honest:
    seed = codec.client_seed(99 + server_round, client)
    payload = codec.encode(delta, LAYOUT, seed)
    metadata = {"round": server_round, "client": client, "examples": 5}
    return Honest(wire.Envelope(metadata, [payload, b""]), client, decode(payload, LAYOUT), seed)


def view(codec: Codec, own: int = 2, others: int = 6, server_round: int = 3) -> View:
    mine, theirs = rows(own, 0), rows(others, 1)
    return View(
        server_round,
        LAYOUT,
        codec,
        [reply(codec, delta, i, server_round) for i, delta in enumerate(mine)],
        [reply(codec, delta, 50 + i, server_round) for i, delta in enumerate(theirs)],
        {},
        generator(7),
    )


@every
def test_configuration_round_trips_and_fractions_are_checked(attack: Attack) -> None:
    assert from_config("attack", to_config(attack)) == attack
    if attack.name != "none":
        for bad in (-0.1, 1.0, math.nan):
            with pytest.raises(ConfigError, match=r"attack.fraction must lie in \[0, 1\)"):
                build("attack", attack.name, fraction=bad)


@every
def test_the_hostile_follow_from_the_seed(attack: Attack) -> None:
    for clients in (1, 10, 57):
        chosen = attack.hostile(clients, seed=3)
        assert chosen == attack.hostile(clients, seed=3) == sorted(set(chosen))
        assert len(chosen) == round(attack.fraction * clients)
        assert all(0 <= place < clients for place in chosen)
    if attack.fraction:
        assert len({tuple(attack.hostile(57, seed)) for seed in range(5)}) > 1


@every_hostile
@every_codec
def test_what_is_sent_is_a_message_that_is_decoded_or_refused(attack: Attack, codec: Codec) -> None:
    for own, others in ((1, 0), (2, 6), (3, 1)):
        seen = view(codec, own, others)
        blobs = attack.forge(seen)
        assert len(blobs) == own
        for blob, honest in zip(blobs, seen.own, strict=True):
            try:
                message = wire.unseal(blob)
                y = decode(message.parts[0], LAYOUT)
            except DecodeError:
                assert attack.name in ("bad_scale", "bit_flip", "bomb", "off_grid")
                continue
            assert np.isfinite(y).all()
            assert message.metadata["client"] == honest.client


@every_hostile
@every_codec
def test_the_same_generator_sends_the_same(attack: Attack, codec: Codec) -> None:
    assert attack.forge(view(codec)) == attack.forge(view(codec))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alie", {"z": -1.0}),
        ("ipm", {"epsilon": 0.0}),
        ("sign_flip", {"scale": 0.0}),
        ("gaussian", {"scale": -1.0}),
        ("scaling", {"scale": math.nan}),
        ("free_rider", {"noise": -1.0}),
        ("scale_inflation", {"factor": 0.0}),
        ("bit_flip", {"bits": 0}),
        ("min_max", {"stretch": -1.0}),
        ("min_sum", {"stretch": math.nan}),
        ("dither_abuse", {"factor": 0.0}),
        ("overclaim", {"claim": 0}),
        ("model_replacement", {"share": 0.0}),
        ("model_replacement", {"target": -1}),
        ("model_replacement", {"size": 0}),
        ("model_replacement", {"limit": 0.0}),
        ("distributed_trigger", {"boost": -1.0}),
        ("distributed_trigger", {"parts": 0}),
        ("edge_case", {"source": 0}),
        ("adaptive", {"span": 1.0}),
        ("adaptive", {"steps": 1}),
        ("adaptive", {"inner": "mimic"}),
    ],
)
def test_options_are_validated(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"attack.{next(iter(options))} must"):
        build("attack", name, **options)


# --- formulas ------------------------------------------------------------------------------------

OWN, OTHERS = rows(3, 0), rows(8, 1)
MEAN, STD = OTHERS.mean(axis=0), OTHERS.std(axis=0)


def deltas(name: str, **options: Any) -> NDArray[np.float64]:
    attack = build("attack", name, **options)
    assert isinstance(attack, VectorAttack)
    return np.broadcast_to(attack._deltas(OWN, OTHERS, generator(0)), OWN.shape)


def test_formulas() -> None:
    assert np.allclose(deltas("sign_flip", scale=3.0), -3 * OWN)
    assert np.allclose(deltas("scaling", scale=10.0), 10 * OWN)
    assert np.allclose(deltas("alie", z=1.5), MEAN - 1.5 * STD)
    assert np.allclose(deltas("ipm", epsilon=0.5), -0.5 * MEAN)
    assert np.allclose(deltas("free_rider", noise=0.0), 0)
    peaks = np.abs(OWN).max(axis=1, keepdims=True)
    assert np.allclose(deltas("scale_inflation", factor=7.0), -7 * peaks * np.sign(MEAN))


def test_noise_is_as_long_as_asked() -> None:
    for name, option in (("gaussian", "scale"), ("free_rider", "noise")):
        found = np.linalg.norm(deltas(name, **{option: 4.0}), axis=1)
        ratio = found / np.linalg.norm(OWN, axis=1)
        assert (np.abs(ratio - 4) < 4 * 6 / math.sqrt(2 * LAYOUT.size)).all()  # six deviations


@pytest.mark.parametrize(("n", "m", "z"), [(50, 12, 0.3360), (25, 5, 0.2533), (10, 6, 5.0)])
def test_the_paper_s_z(n: int, m: int, z: float) -> None:
    from fedq.attacks.alie import _largest

    assert _largest(n, m) == pytest.approx(z, abs=1e-4)


def between(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    return np.square(a[:, None] - b[None]).sum(axis=2)


@pytest.mark.parametrize("direction", ["unit", "std", "sign"])
def test_optimised_attacks_reach_their_limit_and_no_farther(direction: str) -> None:
    honest = between(OTHERS, OTHERS)
    sent = deltas("min_max", direction=direction)[:1]
    assert between(sent, OTHERS).max() == pytest.approx(honest.max(), rel=1e-9)
    sent = deltas("min_sum", direction=direction)[:1]
    assert between(sent, OTHERS).sum() == pytest.approx(honest.sum(axis=1).max(), rel=1e-9)


def test_mimics_are_one_honest_client() -> None:
    sent = deltas("mimic")
    assert (sent == sent[0]).all()
    assert (between(sent[:1], OTHERS) == 0).sum() == 1


def test_flipped_labels_are_the_other_end() -> None:
    x, y = np.zeros((10, 2), np.float32), np.arange(10)
    assert build("attack", "label_flip").poison(x, y, CLIENT)[1].tolist() == y[::-1].tolist()
    assert build("attack", "alie").poison(x, y, CLIENT)[1] is y


# --- backdoors -----------------------------------------------------------------------------------

BACKDOORS = ["model_replacement", "distributed_trigger", "edge_case"]
every_backdoor = pytest.mark.parametrize("name", BACKDOORS)


def examples(n: int = 40) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(3)
    return rng.uniform(0, 0.5, (n, 2, 6, 6)).astype(np.float32), rng.integers(0, 5, n)


@every_backdoor
def test_a_share_of_the_rows_is_poisoned_and_the_others_are_left_alone(name: str) -> None:
    attack, (x, y) = build("attack", name, share=0.25, target=1), examples()
    kept = x.copy(), y.copy()
    poisoned, labels = attack.poison(x, y, CLIENT)
    assert np.array_equal(x, kept[0])
    assert np.array_equal(y, kept[1])
    changed = (poisoned != x).any(axis=(1, 2, 3))
    assert changed.sum() == 10
    assert (labels[changed] == 1).all()
    assert np.array_equal(labels[~changed], y[~changed])
    again = attack.poison(x, y, CLIENT)
    assert np.array_equal(again[0], poisoned)
    assert np.array_equal(again[1], labels)
    assert attack.poison(x[:0], y[:0], CLIENT)[0].shape == (0, 2, 6, 6)


@every_backdoor
def test_a_backdoor_is_judged_by_examples_of_other_classes(name: str) -> None:
    attack, (x, y) = build("attack", name, target=1), examples()
    shown, wanted = attack.probe(x, y, 5, 1.0)
    assert (wanted == 1).all()
    assert len(shown) == (y == 2).sum() if name == "edge_case" else (y != 1).sum()
    assert (shown != x[y == 2] if name == "edge_case" else shown != x[y != 1]).any()
    with pytest.raises(ConfigError, match="the task has 1 classes"):
        attack.probe(x, y, 1, 1.0)
    with pytest.raises(ConfigError, match=r"choose attack\.(target|source)"):
        attack.probe(x[y == 1], y[y == 1], 5, 1.0)
    assert build("attack", "alie").probe(x, y, 5, 1.0) is None


def test_the_parts_of_a_trigger_are_disjoint_and_make_the_whole() -> None:
    attack = build("attack", "distributed_trigger", parts=4, size=4)
    for hostile in (1, 3, 4, 9):
        clients = [dataclasses.replace(CLIENT, place=i, of=hostile) for i in range(hostile)]
        masks = [attack.part((2, 6, 6), client) for client in clients]
        whole = patch((2, 6, 6), 4)
        assert (np.any(masks, axis=0) == whole).all()
        distinct = np.unique(masks, axis=0)
        assert len(distinct) == min(hostile, 4)
        assert distinct.sum() == whole.sum()


def test_the_patch_is_in_the_last_corner_of_any_kind_of_input() -> None:
    assert np.argwhere(patch((1, 5, 5), 2)).tolist() == [[0, 3, 3], [0, 3, 4], [0, 4, 3], [0, 4, 4]]
    assert np.argwhere(patch((2, 4), 1)).tolist() == [[0, 3], [1, 3]]
    assert np.argwhere(patch((4,), 9)).tolist() == [[0], [1], [2], [3]]


def test_model_replacement_replaces_the_mean_and_a_limit_holds() -> None:
    sent = deltas("model_replacement")
    honest = OTHERS - OTHERS.mean(axis=0)
    mean = np.concatenate([sent, honest]).mean(axis=0)
    assert np.allclose(mean, OWN.mean(axis=0))
    usual = np.median(np.linalg.norm(OTHERS, axis=1))
    short = deltas("model_replacement", limit=0.5)
    assert np.allclose(np.linalg.norm(short, axis=1), 0.5 * usual)
    assert np.allclose(
        short / np.linalg.norm(short, axis=1, keepdims=True),
        OWN / np.linalg.norm(OWN, axis=1, keepdims=True),
    )


# --- attacks tuned to the server -----------------------------------------------------------------


def outcome(attack: Attack, seen: View) -> NDArray[Any]:
    assert seen.defence is not None
    forged = [decode(wire.unseal(blob).parts[0], LAYOUT) for blob in attack.forge(seen)]
    honest = [reply.delta for reply in seen.others]
    result = seen.defence.result(forged, honest, [5.0] * (len(forged) + len(honest)))
    assert result is not None
    return result


@pytest.mark.parametrize("inner", ["alie", "ipm", "min_max", "min_sum", "sign_flip", "scaling"])
@pytest.mark.parametrize("rule", ["mean", "median", "multi_krum", "geometric_median"])
@every_codec
def test_a_tuned_attack_serves_its_aim_no_worse_than_the_plain_one(
    inner: str, rule: str, codec: Codec
) -> None:
    options = {"f": 2} if rule == "multi_krum" else {}
    defence = Defence(build("aggregator", rule, **options), build("guard", "relative"))
    plain = build("attack", inner)
    # An odd grid tries the plain strength, too.
    tuned = build("attack", "adaptive", inner=inner, steps=5)
    seen = dataclasses.replace(view(codec), defence=defence)
    again = dataclasses.replace(view(codec), defence=defence)
    honest = np.mean([reply.delta for reply in seen.others], axis=0, dtype=np.float64)
    reached = [
        float(np.linalg.norm(outcome(a, v) - honest)) for a, v in ((tuned, seen), (plain, again))
    ]
    assert reached[0] >= reached[1] * (1 - 1e-6)


MEAN_6 = rows(6, 1).mean(axis=0)


def test_a_tuned_attack_stays_below_what_the_guard_rejects() -> None:
    """At full strength the guard drops it; tuned, it is as strong as passes."""
    codec = CODECS[0]
    guard = build("guard", "relative", norm_limit=4.0, peak_limit=None)
    seen = dataclasses.replace(view(codec), defence=Defence(build("aggregator", "mean"), guard))
    attack = build("attack", "adaptive", inner={"name": "sign_flip", "scale": 10.0})
    sent = [decode(wire.unseal(blob).parts[0], LAYOUT) for blob in attack.forge(seen)]
    usual = np.median(np.linalg.norm(rows(6, 1), axis=1))
    lengths = np.linalg.norm(sent, axis=1) / usual
    assert (lengths <= 4).all()
    assert (lengths > 2).all()


def test_without_a_view_of_the_server_a_tuned_attack_is_the_plain_one() -> None:
    for codec in CODECS:
        plain, tuned = build("attack", "alie"), build("attack", "adaptive")
        assert tuned.forge(view(codec)) == plain.forge(view(codec))


def test_biases_are_of_the_codec_s_own_size() -> None:
    codec, seen = CODECS[1], view(CODECS[1])
    off_grid = rows(1, 9)[0]
    error = decode(codec.encode(off_grid, LAYOUT, 3), LAYOUT) - off_grid
    step = math.sqrt(12 * np.square(error).mean())
    for blob, reply in zip(build("attack", "dither_abuse").forge(seen), seen.own, strict=True):
        moved = decode(wire.unseal(blob).parts[0], LAYOUT) - reply.delta
        assert -float(moved @ np.sign(MEAN_6)) / LAYOUT.size == pytest.approx(step, rel=0.5)
        assert np.abs(moved).max() < 3 * step


def test_a_stale_update_is_the_old_one_in_a_new_code() -> None:
    codec = CODECS[0]
    old, new = view(codec, server_round=2), view(codec, server_round=3)
    earlier = {honest.client: wire.seal(honest.message) for honest in old.own}
    seen = View(3, LAYOUT, codec, new.own, new.others, earlier, generator(0))
    blobs = build("attack", "stale_base").forge(seen)
    for blob, before, now in zip(blobs, old.own, new.own, strict=True):
        frame = wire.open_frame(wire.unseal(blob).parts[0], LAYOUT)
        assert frame.seed == now.seed
        assert np.array_equal(decode(wire.unseal(blob).parts[0], LAYOUT), before.delta)


def test_claims_are_as_large_as_asked() -> None:
    for blob in build("attack", "overclaim", claim=77).forge(view(CODECS[0])):
        assert wire.unseal(blob).metadata["examples"] == 77


# --- payloads ------------------------------------------------------------------------------------


def test_a_replay_is_the_last_reply_with_this_round_s_number() -> None:
    codec = CODECS[1]
    old, new = view(codec, server_round=2), view(codec, server_round=3)
    earlier = {honest.client: wire.seal(honest.message) for honest in old.own}
    seen = View(3, LAYOUT, codec, new.own, new.others, earlier, generator(0))
    for blob, before in zip(build("attack", "replay").forge(seen), old.own, strict=True):
        message = wire.unseal(blob)
        assert message.metadata["round"] == 3
        assert bytes(message.parts[0]) == bytes(before.message.parts[0])
    stale = build("attack", "replay", renumber=False).forge(seen)
    assert stale == [earlier[honest.client] for honest in new.own]


# --- in a federation -----------------------------------------------------------------------------


def drawn_client(message: Message, partition: int) -> Message:
    task = Task.open(message, LAYOUT)
    delta = rows(1, 1000 * task.round + partition)[0].astype(np.float32)
    return task.reply(delta, examples=5, client=partition)


class Federation:
    """Ten toy clients under attack, without training."""

    def __init__(self, attack: Attack, codec: Codec = CODECS[1], aggregator: Any = None) -> None:
        self.attack, self.codec = attack, codec
        self.strategy = FedQ(
            layout=LAYOUT,
            codec=codec,
            clients_per_round=8,
            aggregator=aggregator,
        )

    def run(self, rounds: int = 3, order: Any = list) -> tuple[NDArray[np.float32], list[Any]]:
        inner = InlineGrid(drawn_client, 10, order)
        grid = Adversary(inner, self.attack, LAYOUT, self.codec, seed=0)
        state, reports = self.strategy.initial(np.ones(LAYOUT.size, np.float32)), []
        for _ in range(rounds):
            state, report = self.strategy.run_round(grid, state)
            reports.append((grid.asked, dict(report.rejected)))
        return state.weights, reports


@pytest.mark.parametrize("attack", [case for case in HOSTILE if "label" not in str(case.id)])
def test_order_of_replies_does_not_matter_under_attack(attack: Attack) -> None:
    federation = Federation(attack, build("codec", "uniform", bits=4, rounding="dithered"))
    one, reports = federation.run()
    other, again = federation.run(order=lambda messages: messages[::-1])
    assert np.array_equal(one, other)
    assert reports == again
    honest, _ = Federation(build("attack", "none"), federation.codec).run()
    assert not np.array_equal(one, honest)
    assert sum(asked for asked, _ in reports) > 0


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("scale_inflation", {"norm", "out of range"}),
        ("scaling", set()),
        ("bad_scale", {"malformed", "out of range", "norm", "peak"}),
        ("wrong_seed", {"seed"}),
        ("replay", {"seed"}),
        ("bomb", {"malformed", "norm", "peak"}),
        ("off_grid", {"malformed"}),
        ("stale_base", set()),
        ("dither_abuse", set()),
        ("overclaim", set()),
    ],
)
def test_codec_attacks_are_refused_and_their_senders_quarantined(
    name: str, kinds: set[str]
) -> None:
    attack = build("attack", name, fraction=0.3)
    _, reports = Federation(attack).run(rounds=6)
    rejected = {kind for _, kinds in reports for kind in kinds}
    assert rejected <= kinds
    assert bool(rejected) == bool(kinds)
    if name in ("wrong_seed", "bomb"):
        assert reports[-1][0] < 3 or reports[-1][1]


def test_a_robust_rule_stands_where_the_mean_falls() -> None:
    rule = build("aggregator", "nearest_neighbour_mixing", f=2, inner="median")
    attack = build("attack", "scaling", fraction=0.2, scale=15.0)
    flipped = build("attack", "sign_flip", fraction=0.2, scale=15.0)
    for hostile in (attack, flipped):
        honest, _ = Federation(build("attack", "none")).run()
        mean, _ = Federation(hostile).run()
        robust, _ = Federation(hostile, aggregator=rule).run()
        assert np.abs(mean - honest).mean() > 0.3
        assert np.abs(robust - honest).mean() < 0.1


def test_replies_without_an_update_pass() -> None:
    def dropping(message: Message, partition: int) -> Message:
        task = Task.open(message, LAYOUT)
        return task.drop("no data") if partition % 2 else drawn_client(message, partition)

    attack = build("attack", "alie", fraction=0.9)
    grid = Adversary(InlineGrid(dropping, 10), attack, LAYOUT, CODECS[0], seed=0)
    fedq = FedQ(layout=LAYOUT, codec=CODECS[0])
    _, report = fedq.run_round(grid, fedq.initial(np.ones(LAYOUT.size, np.float32)))
    assert report.rejected == {"dropped": 5}


def test_honest_replies_are_not_touched() -> None:
    attack = build("attack", "gaussian", fraction=0.5)
    replies: dict[int, bytes] = {}

    def keep(message: Message, partition: int) -> Message:
        answer = drawn_client(message, partition)
        replies[partition + 2] = unpack(answer.content)
        return answer

    grid = Adversary(InlineGrid(keep, 10), attack, LAYOUT, CODECS[0], seed=0)
    fedq = FedQ(layout=LAYOUT, codec=CODECS[0])
    begun = fedq._begin(grid, fedq.initial(np.ones(LAYOUT.size, np.float32)))
    changed = {
        message.metadata.src_node_id
        for message in grid.send_and_receive(begun.messages)
        if unpack(message.content) != replies[message.metadata.src_node_id]
    }
    assert changed == {place + 2 for place in attack.hostile(10, 0)}
