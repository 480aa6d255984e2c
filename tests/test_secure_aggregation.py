"""Secure aggregation: the exact sum of whoever is left, or a named error; and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedq import build, config
from fedq.errors import ConfigError, DecodeError, FedqError
from fedq.keys import SimulatedRoster, simulated
from fedq.secagg import (
    PHASES,
    AbortedError,
    Announcement,
    Coordinator,
    Grid,
    Party,
    RefusedError,
    _messages,
    _shamir,
    _words,
)

ROSTER = SimulatedRoster(0)
SERVER = simulated(0).signing
PARTS = ((5, 7), (2, 40))
SESSION = _messages.SESSION_BYTES
ADVERT, TAG = _messages.Advert.SIZE, 2 + _messages.TAG_BYTES


def announced(clients: int, **changes: object) -> Announcement:
    neighbours = changes.get("neighbours", clients)
    assert isinstance(neighbours, int)
    nearby = min(neighbours, clients - 1) + 1
    defaults: dict[str, object] = {
        "run": "test",
        "round": 1,
        "session": f"{clients:032x}",
        "clients": clients,
        "neighbours": clients,
        "threshold": nearby * 2 // 3 + 1,
        "parts": PARTS,
        "coding": {},
        "base": "0" * 64,
    }
    return Announcement(**{**defaults, **changes})  # type: ignore[arg-type]


def vectors(clients: int) -> dict[int, list[np.ndarray]]:
    """Integers whose sum stays within the parts."""
    rng = np.random.default_rng(clients)
    ranges = [(1 << bits - 1) // clients - 1 for _, bits in PARTS]
    return {
        i: [rng.integers(-r, r + 1, size) for r, (size, _) in zip(ranges, PARTS, strict=True)]
        for i in range(clients)
    }


Tamper = Callable[[bytes], bytes | None]


@dataclass
class Fleet:
    """Clients of which each may be silent or lie in a phase, and forgets all but its memory."""

    clients: int
    silent: Mapping[str, Collection[int]] = field(default_factory=dict)
    lies: Mapping[tuple[str, int], Tamper] = field(default_factory=dict)
    memories: dict[int, bytes | None] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    rejected: list[tuple[str, int]] = field(default_factory=list)

    def party(self, client: int) -> Party:
        memory = self.memories.get(client)
        return Party(client, simulated(0, client).signing, ROSTER, memory=memory)

    def ask(self, phase: str, client: int, message: bytes) -> bytes:
        party = self.party(client)
        values = [vectors(self.clients)[client]] if phase == "mask" else []
        try:
            answer: bytes = getattr(party, phase)(message, *values)
        finally:
            self.memories[client] = party.memory()
        return answer

    def run(self, announcement: Announcement, until: str = "unmask") -> Coordinator:
        server = Coordinator(announcement, SERVER, ROSTER, range(self.clients))
        for phase in PHASES[: PHASES.index(until) + 1]:
            for who, message in server.messages(phase).items():
                assert isinstance(who, int)
                if who in self.silent.get(phase, ()):
                    continue
                try:
                    answer: bytes | None = self.ask(phase, who, message)
                except RefusedError as error:
                    self.refused[who] = str(error)
                    continue
                assert answer is not None
                answer = self.lies.get((phase, who), lambda same: same)(answer)
                if answer is not None:
                    try:
                        server.receive(phase, who, answer)
                    except DecodeError:
                        self.rejected.append((phase, who))
        return server


def check_exact(server: Coordinator, clients: int) -> None:
    """The sum is that of the survivors, to the last bit."""
    sums, values = server.sums(), vectors(clients)
    for part, total in enumerate(sums):
        expected = sum(values[who][part] for who in server.survivors)  # type: ignore[index]
        np.testing.assert_array_equal(total, expected)


# --- honest clients that come and go -------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_the_sum_is_exact_or_there_is_none(data: st.DataObject) -> None:
    clients = data.draw(st.integers(3, 8))
    some = st.sets(st.integers(0, clients - 1), max_size=3)
    silent = {phase: data.draw(some) for phase in PHASES}
    announcement = announced(clients)
    left, enough = set(range(clients)), True
    for phase in PHASES:
        left -= silent[phase]
        enough &= len(left) >= announcement.threshold
    fleet = Fleet(clients, silent)
    try:
        server = fleet.run(announcement)
        check_exact(server, clients)
        assert enough
    except AbortedError:
        assert not enough


@settings(max_examples=10)
@given(st.data())
def test_a_sparse_graph_sums_exactly_too(data: st.DataObject) -> None:
    clients = 20
    silent = {phase: data.draw(st.sets(st.integers(0, 19), max_size=2)) for phase in PHASES}
    announcement = announced(clients, neighbours=8, threshold=5)
    try:
        check_exact(Fleet(clients, silent).run(announcement), clients)
    except AbortedError:
        assert any(silent.values())


def test_nobody_is_asked_for_what_the_others_cannot_use() -> None:
    fleet = Fleet(6, {"share": [0], "mask": [1]})
    server = fleet.run(announced(6, threshold=4))
    assert sorted(server.survivors) == [2, 3, 4, 5]  # type: ignore[type-var]
    check_exact(server, 6)


def test_secrets_end_with_the_round() -> None:
    fleet = Fleet(4)
    fleet.run(announced(4), until="agree")
    assert all(json.loads(m or b"")["session"] for m in fleet.memories.values())
    Fleet(4, memories=fleet.memories).run(announced(4))
    assert all(json.loads(m or b"")["session"] is None for m in fleet.memories.values())


@pytest.mark.parametrize(
    "memory",
    [b"{", b"[]", b"{}", b'{"spent": 1, "session": null}', b'{"spent": {}, "session": {}}'],
)
def test_a_damaged_memory_is_one_line(memory: bytes) -> None:
    with pytest.raises(RefusedError, match="damaged; remove"):
        Fleet(4, memories={0: memory}).party(0)


# --- clients that lie ----------------------------------------------------------------------------


def flipped(at: int) -> Tamper:
    def flip(answer: bytes) -> bytes:
        changed = bytearray(answer)
        changed[at] ^= 1
        return bytes(changed)

    return flip


OTHER = _messages.Advert.make(
    2, *(bytes([n]) * 32 for n in range(3)), simulated(0, 2).signing, bytes(32)
)
LIES: dict[str, tuple[str, Tamper, bool]] = {
    # name: phase, what client 1 does to its answer, whether the server notices at once
    "empty": ("advertise", lambda _: b"", True),
    "another session": ("advertise", flipped(0), True),
    "another client's number": ("advertise", flipped(SESSION + 7), True),
    "unsigned key": ("advertise", flipped(SESSION + 8), True),
    "unsigned commitment": ("advertise", flipped(SESSION + 80), True),
    "an advert of another round": ("advertise", lambda a: a[:SESSION] + OTHER.packed, True),
    "truncated advert": ("advertise", lambda a: a[:-1], True),
    "truncated shares": ("share", lambda a: a[:-1], True),
    "long shares": ("share", lambda a: a + b"0", True),
    "a share that nobody can open": ("share", flipped(-1), False),
    "truncated integers": ("mask", lambda a: a[:-1], True),
    "long integers": ("mask", lambda a: a + b"0", True),
    "padding bits": ("mask", lambda a: a[: SESSION + 4] + b"\xff" + a[SESSION + 5 :], True),
    "integers of another session": ("mask", flipped(3), True),
    "a wrong tag": ("agree", flipped(-1), False),
    "truncated agreement": ("agree", lambda a: a[:-1], True),
    "a wrong share": ("unmask", flipped(-1), False),
    "swapped shares": ("unmask", lambda a: a[:-64] + a[-32:] + a[-64:-32], False),
    "no shares": ("unmask", lambda a: a[:SESSION] + b"\x00", False),
    "truncated shares at the end": ("unmask", lambda a: a[:-1], True),
    "bits beyond the cohort": ("unmask", lambda a: a[:SESSION] + b"\xff" + a[SESSION + 1 :], True),
}


@pytest.mark.parametrize("name", LIES)
def test_a_client_that_lies_does_not_change_the_sum(name: str) -> None:
    phase, lie, noticed = LIES[name]
    fleet = Fleet(6, lies={(phase, 1): lie})
    server = fleet.run(announced(6, threshold=4))
    assert fleet.rejected == ([(phase, 1)] if noticed else [])
    assert not fleet.refused
    assert (1 in server.survivors) == (phase in ("agree", "unmask") or not noticed)
    check_exact(server, 6)


def test_answers_count_once_and_only_of_those_asked() -> None:
    fleet, announcement = Fleet(4), announced(4)
    server = Coordinator(announcement, SERVER, ROSTER, range(3))
    for phase in PHASES:
        for who, message in server.messages(phase).items():
            answer = fleet.ask(phase, who, message)  # type: ignore[arg-type]
            server.receive(phase, who, answer)
            for again in (who, 3):
                with pytest.raises(DecodeError):
                    server.receive(phase, again, answer)
    check_exact(server, 4)


def test_a_client_may_not_take_part_twice() -> None:
    server = Coordinator(announced(4), SERVER, ROSTER, range(4))
    message = server.messages("advertise")[0]
    server.receive("advertise", 0, Fleet(4).ask("advertise", 1, message))
    with pytest.raises(DecodeError, match="takes part already"):
        server.receive("advertise", 1, Fleet(4).ask("advertise", 1, message))


def lying_dealer(lie: Callable[[bytes, int], bytes], drop: tuple[int, ...] = ()) -> AbortedError:
    """Return how a round ends whose client 2 changes the shares that it deals."""
    clients = 5
    fleet = Fleet(clients)
    server = Coordinator(announced(clients), SERVER, ROSTER, range(clients))
    for phase in PHASES:
        for who, message in server.messages(phase).items():
            assert isinstance(who, int)
            if phase == "unmask" and who in drop:
                continue
            if (phase, who) == ("share", 2):
                fleet.memories[2] = lie(fleet.memories[2] or b"", 0)
            answer = fleet.ask(phase, who, message)
            if (phase, who) == ("share", 2):
                answer = lie(answer, 1)
            server.receive(phase, who, answer)
    with pytest.raises(AbortedError) as caught:
        server.sums()
    return caught.value


def other_seed(data: bytes, which: int) -> bytes:
    """Its memory says another seed than it committed to."""
    if which == 1:
        return data
    memory = json.loads(data)
    memory["session"]["own_seed"] = _shamir.draw().hex()
    return json.dumps(memory).encode()


def broken_seals(data: bytes, which: int) -> bytes:
    """Nobody can open the shares that it sealed."""
    if which == 0:
        return data
    size = 4 * _messages.SEALED_BYTES
    return data[:-size] + bytes(255 - byte for byte in data[-size:])


def test_a_dealer_of_wrong_shares_is_named_and_ends_the_round_cleanly() -> None:
    error = lying_dealer(other_seed)
    assert "client 2 dealt shares of something else" in str(error)
    assert error.culprit == 2


def test_a_dealer_whose_shares_nobody_can_open_is_to_blame() -> None:
    error = lying_dealer(broken_seals)
    assert "shares of client 2's keys came back" in str(error)
    assert error.culprit == 2


def test_nobody_is_to_blame_for_shares_of_which_holders_are_lost() -> None:
    """Two holders lost, and one without: as many as may lie, so it may be bad luck."""

    def one_broken_seal(data: bytes, which: int) -> bytes:
        return data if which == 0 else data[:-1] + bytes([255 - data[-1]])

    threshold = announced(5).threshold
    error = lying_dealer(one_broken_seal, drop=tuple(range(5 - threshold)))
    assert error.culprit is None


# --- a server that lies --------------------------------------------------------------------------


def until(phase: str, clients: int = 6, **changes: object) -> tuple[Fleet, dict[int, bytes]]:
    """Return a fleet that waits for a phase, and the honest messages of that phase."""
    fleet, announcement = Fleet(clients), announced(clients, threshold=4, **changes)
    server = Coordinator(announcement, SERVER, ROSTER, range(clients))
    for now in PHASES:
        messages = {int(str(who)): m for who, m in server.messages(now).items()}
        if now == phase:
            return fleet, messages
        for who, message in messages.items():
            server.receive(now, who, fleet.ask(now, who, message))
    raise AssertionError(phase)


def sealed(announcement: Announcement, key: int | None = None) -> bytes:
    return announcement.sealed(simulated(0, key).signing)


def without_signature(announcement: Announcement) -> bytes:
    return bytes(64) + sealed(announcement)[64:]


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "not signed by our server"),
        (without_signature(announced(6)), "not signed by our server"),
        (sealed(announced(6), key=3), "not signed by our server"),
        (sealed(announced(6)).replace(b'"clients": 6', b'"clients": 3'), "not signed"),
        (sealed(announced(2, threshold=2)), "a round of 2 clients"),
        (sealed(announced(6, threshold=3)), "more than half"),
        (sealed(announced(6, threshold=7)), "more than half"),
        (sealed(announced(6, neighbours=1, threshold=2)), "hide nothing"),
        (sealed(announced(6, neighbours=0, threshold=1)), "hide nothing"),
    ],
)
def test_announcements_that_are_refused(message: bytes, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        Fleet(6).ask("advertise", 0, message)


def swap(message: bytes, client: int, at: int, new: bytes) -> bytes:
    """Replace bytes of a client's advert in the list of all."""
    place = SESSION + ADVERT * client + at
    return message[:place] + new + message[place + len(new) :]


MALLORY = _messages.Advert.make(
    2, *(simulated(9, n).public.agreement for n in range(3)), simulated(9, 2).signing, bytes(32)
)
SHARE_LIES: dict[str, tuple[Tamper, str]] = {
    "substituted mask key": (lambda m: swap(m, 2, 40, MALLORY.mask_key), "not signed by a device"),
    "substituted client": (lambda m: swap(m, 2, 0, MALLORY.packed), "not signed by a device"),
    "this one's own keys replaced": (lambda m: swap(m, 0, 40, bytes(32)), "own keys"),
    "too few": (lambda m: m[: SESSION + 2 * ADVERT], "clients advertised"),
    "twice the same": (lambda m: m + m[-ADVERT:], "name a client twice"),
    "truncated": (lambda m: m[:-1], "truncated"),
    "of another session": (flipped(0), "another session"),
    "too few of the neighbours": (lambda m: m[: SESSION + 3 * ADVERT], "neighbourhood are left"),
}


@pytest.mark.parametrize("name", SHARE_LIES)
def test_adverts_that_are_refused(name: str) -> None:
    lie, why = SHARE_LIES[name]
    fleet, messages = until("share")
    with pytest.raises(RefusedError, match=why):
        fleet.ask("share", 0, lie(messages[0]) or b"")


def bitmap(*members: int) -> Tamper:
    return lambda m: m[:SESSION] + _messages.to_bitmap(members, 6) + m[SESSION + 1 :]


@pytest.mark.parametrize(
    ("phase", "lie", "why"),
    [
        ("mask", bitmap(0, 1, 2), "neighbourhood are left"),
        ("mask", bitmap(1, 2, 3, 4, 5), "not on the list"),
        ("mask", lambda m: m + b"\0", "bitmap"),
        ("mask", flipped(5), "another session"),
        ("agree", bitmap(0, 1, 2), "neighbourhood are left"),
        ("agree", bitmap(0, 1), "a sum of 2 clients"),
        ("agree", bitmap(1, 2, 3, 4, 5), "not on the list"),
        ("agree", lambda m: m[:-1], "truncated"),
        ("unmask", lambda m: m[:SESSION], "1 of 4 neighbours attest"),
        ("unmask", lambda m: m[: SESSION + 2 * TAG], "3 of 4 neighbours attest"),
        ("unmask", lambda m: m[:SESSION] + 5 * m[SESSION : SESSION + TAG], "2 of 4 neighbours"),
        ("unmask", lambda m: flipped(SESSION + 2)(m[: SESSION + 3 * TAG]), "3 of 4 neighbours"),
        ("unmask", lambda m: m[: SESSION + 3 * TAG - 1], "3 of 4 neighbours attest"),
    ],
)
def test_lists_that_are_refused(phase: str, lie: Tamper, why: str) -> None:
    fleet, messages = until(phase)
    with pytest.raises(RefusedError, match=why):
        fleet.ask(phase, 0, lie(messages[0]) or b"")


def test_a_survivor_without_a_mask_is_refused() -> None:
    fleet = Fleet(6, {"share": [5]})
    server = fleet.run(announced(6, threshold=4), until="mask")
    message = server.messages("agree")[0]
    with pytest.raises(RefusedError, match="without a mask"):
        fleet.ask("agree", 0, bitmap(0, 1, 2, 3, 4, 5)(message) or b"")


def proofs(answers: Mapping[int, bytes], who: int) -> bytes:
    """What a server forwards of six clients' tags to one of them."""
    text = b""
    for i, answer in answers.items():
        if i != who:
            at = SESSION + _messages.TAG_BYTES * (who if who < i else who - 1)
            text += i.to_bytes(2, "big") + answer[at : at + _messages.TAG_BYTES]
    return text


def test_two_lists_of_survivors_uncover_nothing() -> None:
    """Half of the clients are told that client 5 is alive, half that it is dead: both are stuck."""
    fleet, honest = until("agree")
    lie = bitmap(0, 1, 2, 3, 4)
    answers = {}
    for who in range(6):
        message = honest[who] if who in (3, 4, 5) else lie(honest[who]) or b""
        answers[who] = fleet.ask("agree", who, message)
    for who in range(6):
        with pytest.raises(RefusedError, match="3 of 4 neighbours attest"):
            fleet.ask("unmask", who, honest[who][:SESSION] + proofs(answers, who))


@pytest.mark.parametrize("phase", PHASES[1:])
def test_phases_come_once_and_in_turn(phase: str) -> None:
    fleet, messages = until(phase)
    fleet.ask(phase, 0, messages[0])
    with pytest.raises(RefusedError, match="out of turn"):
        fleet.ask(phase, 0, messages[0])
    for other in set(PHASES[1:]) - {phase}:
        fresh, _ = until(phase)
        with pytest.raises(RefusedError, match="out of turn"):
            fresh.ask(other, 0, messages[0])


def test_one_sum_per_round_but_the_same_one_again() -> None:
    fleet = Fleet(6)
    fleet.run(announced(6, threshold=4))
    # A server that was killed and resumed asks again, in a session of its own.
    again = Fleet(6, memories=fleet.memories)
    check_exact(again.run(announced(6, threshold=4, session="a" * 32)), 6)
    assert not again.refused
    # One that asks for the sum without client 5 could subtract.
    fewer = Fleet(6, {"mask": [5]}, memories=fleet.memories)
    with pytest.raises(AbortedError):
        fewer.run(announced(6, threshold=4, session="b" * 32))
    assert set(fewer.refused) == {0, 1, 2, 3, 4}
    assert "another sum of round 1" in fewer.refused[0]
    other_model = Fleet(6, memories=fleet.memories)
    with pytest.raises(AbortedError):
        other_model.run(announced(6, threshold=4, base="1" * 64))
    later = Fleet(6, {"mask": [5]}, memories=fleet.memories)
    check_exact(later.run(announced(6, threshold=4, round=2)), 6)


@settings(max_examples=25)
@given(st.integers(0, 1), st.sets(st.integers(1, 5)), st.sets(st.integers(1, 5)))
def test_no_lists_bring_both_shares_of_a_client(
    first: int, alive: set[int], second: set[int]
) -> None:
    """Whatever lists it is shown, in whatever order, a client never gives both of a peer's."""
    given_shares: dict[int, set[bytes]] = {}
    fleet, honest = until("agree")
    for survivors in (alive, second):
        lists = sorted({0, *survivors})
        message = bitmap(*lists)(honest[0]) or b""
        try:
            fleet.ask("agree", 0, message)
            view = {i: fleet.ask("agree", i, bitmap(*lists)(honest[i]) or b"") for i in lists[1:]}
            answer = fleet.ask("unmask", 0, honest[0][:SESSION] + proofs(view, 0))
        except RefusedError:
            continue
        for i in range(6):
            at = SESSION + 1 + 32 * i
            given_shares.setdefault(i, set()).add(answer[at : at + 32])
    assert all(len(shares) == 1 for shares in given_shares.values())


def test_what_clients_are_told_apart_cannot_be_added() -> None:
    """A client that was told another configuration signs for that one; its keys are no use."""
    fleet = Fleet(4)
    server = Coordinator(announced(4, threshold=3), SERVER, ROSTER, range(4))
    other = sealed(announced(4, threshold=3, base="1" * 64))
    for who, message in server.messages("advertise").items():
        assert isinstance(who, int)
        answer = fleet.ask("advertise", who, other if who == 1 else message)
        if who == 1:
            with pytest.raises(DecodeError):
                server.receive("advertise", who, answer)
        else:
            server.receive("advertise", who, answer)


# --- what is seen --------------------------------------------------------------------------------


def test_a_masked_vector_looks_uniform() -> None:
    """Chi-square over all 2**8 values; a sound protocol fails once in a million runs."""
    size, bits = 1 << 16, 8
    parts = ((size, bits),)
    fleet = Fleet(4)
    server = Coordinator(announced(4, parts=parts), SERVER, ROSTER, range(4))
    for phase in PHASES[:2]:
        for who, message in server.messages(phase).items():
            server.receive(phase, who, fleet.ask(phase, who, message))  # type: ignore[arg-type]
    party = fleet.party(0)
    answer = party.mask(server.messages("mask")[0], [np.zeros(size, np.int64)])
    counts = np.bincount(np.frombuffer(answer[SESSION:], np.uint8), minlength=256)
    statistic = ((counts - size / 256) ** 2 / (size / 256)).sum()
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], 255)
    assert low < statistic < high


def test_no_secret_is_in_a_log_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secrets: set[str] = set()
    texts: list[str] = []
    for phase in PHASES[1:]:
        fleet, messages = until(phase)
        for memory in fleet.memories.values():
            session = json.loads(memory or b"")["session"]
            for name in ("share_secret", "mask_secret", "own_seed"):
                secrets.add(session[name])
            secrets |= {*session["shares"].values(), *session["keys"].values()}
        for lie in (flipped(-1), flipped(3), lambda m: m[:-1]):
            try:
                fleet.ask(phase, 0, lie(messages[0]) or b"")
            except FedqError as error:
                texts.append(repr(error) + str(error.__cause__) + str(error.__context__))
    texts.append(repr(simulated(0)))
    said = caplog.text + "".join(texts)
    assert len(secrets) > 50
    for secret in secrets:
        assert secret not in said
        assert repr(bytes.fromhex(secret)) not in said


# --- numbers -------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(0, 50), st.integers(0, 2**32))
def test_words_pack_in_exactly_so_many_bits(bits: int, size: int, seed: int) -> None:
    segment = _words.Segment(size, bits)
    half = 1 << bits - 1
    values = np.random.default_rng(seed).integers(-half, half, size, dtype=np.int64)
    body = _words.pack(_words.wrap([values], [segment]), [segment])
    assert len(body) == segment.packed_bytes <= (bits * size + 7) // 8 + bits // 16
    np.testing.assert_array_equal(
        _words.centred(_words.unpack(body, [segment]), [segment])[0], values
    )
    for wrong in (body[:-1], body + b"\0"):
        if wrong != body:
            with pytest.raises(DecodeError):
                _words.unpack(wrong, [segment])


@given(st.integers(1, 6), st.data())
def test_any_threshold_of_shares_gives_the_secret(threshold: int, data: st.DataObject) -> None:
    holders = data.draw(st.lists(st.integers(1, 99), min_size=threshold, max_size=9, unique=True))
    secret = _shamir.draw()
    shares = _shamir.split(secret, threshold, holders)
    chosen = data.draw(st.permutations(holders))[:threshold]
    assert _shamir.combine({x: shares[x] for x in chosen}) == secret
    if threshold > 1:
        assert _shamir.combine({x: shares[x] for x in chosen[1:]}) != secret


def test_the_field_is_prime() -> None:
    """Fermat's test to many bases."""
    assert all(pow(base, _shamir.PRIME - 1, _shamir.PRIME) == 1 for base in range(2, 60))


@pytest.mark.parametrize("rotate", [False, True])
def test_the_mean_on_the_grid_is_unbiased(rotate: bool) -> None:
    """Over 400 seeds the mean of means lies within 6 of its standard deviations."""
    d, clients, seeds = 100, 3, 400
    rng = np.random.default_rng(1)
    grid = Grid(bits=4, clip=1.0, max_weight=7, rotate=rotate)
    deltas = rng.uniform(-0.4, 0.4, (clients, d)).astype(np.float32)
    weights = np.array([1, 3, 7])
    segments = grid.segments(clients, d, 2)
    states = rng.normal(size=(clients, 2)).astype(np.float32)
    total = np.zeros(d)
    for seed in range(seeds):
        sums = [np.zeros(segment.size, np.int64) for segment in segments]
        for i in range(clients):
            integers = grid.encode(
                deltas[i], states[i], loss=i, weight=int(weights[i]), seed=7 * seed + i,
                rotation_seed=seed,
            )  # fmt: skip
            sums = [a + b for a, b in zip(sums, integers, strict=True)]
        words = _words.wrap(sums, segments)
        mean = grid.decode(_words.centred(words, segments), clients, d, rotation_seed=seed)
        total += mean.delta
    expected = weights @ deltas / weights.sum()
    deviation = grid.step / 2 * np.sqrt((weights**2).sum()) / weights.sum() / np.sqrt(seeds)
    assert np.abs(total / seeds - expected).max() < 6 * deviation
    np.testing.assert_allclose(mean.state, weights @ states / weights.sum(), atol=1e-4)
    assert mean.loss == pytest.approx((weights @ range(clients)) / weights.sum(), abs=1e-4)
    assert mean.weight == weights.sum()


def test_what_is_beyond_the_clip_is_cut_and_the_sum_never_wraps() -> None:
    grid = Grid(bits=8, clip=0.5, max_weight=10)
    segments = grid.segments(5, 3, 0)
    delta = np.array([9.0, -9.0, 0.5], np.float32)
    integers = grid.encode(delta, np.zeros(0, np.float32), loss=1e9, weight=99, seed=1)
    sums = [5 * array for array in integers]
    words = _words.wrap(sums, segments)
    mean = grid.decode(_words.centred(words, segments), 5, 3)
    np.testing.assert_allclose(mean.delta, [0.5, -0.5, 0.5])
    assert mean.weight == 50


@pytest.mark.parametrize(
    ("codes", "weight", "why"),
    [
        ([1, 2, 3], 2, "cannot weigh 2"),
        ([1, 2, 3], 31, "cannot weigh 31"),
        ([1, 2, -128 * 9], 9, "beyond the clip"),
    ],
)
def test_sums_that_no_honest_clients_have(codes: list[int], weight: int, why: str) -> None:
    grid = Grid(bits=8, clip=1.0, max_weight=10)
    with pytest.raises(DecodeError, match=why):
        grid.decode([np.array(codes), np.array([0, weight])], 3, 3)


# --- configuration -------------------------------------------------------------------------------

SECAGG = "secure_aggregation=secagg"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([SECAGG, "aggregator=median"], "compares single updates"),
        (["secure_aggregation=clear", "aggregator=trimmed_mean"], "compares single updates"),
        ([SECAGG, "codec=error_feedback", "codec.inner=sign"], "feeds no errors back"),
        ([SECAGG, "uplink_context=true"], "uplink_context"),
        ([SECAGG, "clients_per_round=2"], "at least 3 clients"),
        ([SECAGG, "clients=10", "clients_per_round=0.2"], "at least 3 clients"),
        ([SECAGG, "secure_aggregation.bits=16", "max_examples=100000"], "needs 36 bits"),
        ([SECAGG, "secure_aggregation.bits=1"], "2 to 16"),
        ([SECAGG, "secure_aggregation.clip=0"], "positive"),
        ([SECAGG, "secure_aggregation.clip=1e9"], "at most 8192"),
        ([SECAGG, "secure_aggregation.threshold=0.4"], "threshold"),
        ([SECAGG, "secure_aggregation.threshold=1.0"], "threshold"),
        ([SECAGG, "secure_aggregation.neighbours=7"], "even"),
        (["secure_aggregation=grouped", "secure_aggregation.group_size=2"], "group_size"),
        (["secure_aggregation=secag"], "did you mean 'secagg'"),
        (["keys=''", SECAGG], "keys"),
    ],
)
def test_wrong_use_is_refused_at_the_start(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config.load(overrides)


def test_right_use() -> None:
    assert config.load([SECAGG]).secure_aggregation.bits == 8
    assert not config.load([]).secure_aggregation.integers
    grouped = config.load(["secure_aggregation=grouped", "aggregator=median"])
    assert [len(g) for g in grouped.secure_aggregation.groups(10, 0)] == [5, 5]
    numbers = build("secure_aggregation", "secagg").numbers
    assert numbers(200)["neighbours"] == 200
    assert numbers(300) == {"neighbours": 100, "threshold": 68}


def test_eight_bits_of_a_hundred_clients_are_two_bytes_at_most() -> None:
    segments = build("secure_aggregation", "secagg").grid(1).segments(100, 10**6, 50)
    assert sum(segment.packed_bytes for segment in segments) <= 2 * 10**6


@given(st.binary(max_size=400))
def test_bytes_of_a_peer_raise_named_errors_only(data: bytes) -> None:
    for phase in PHASES:
        with pytest.raises(RefusedError):
            Fleet(4).ask(phase, 0, data)
    server = Coordinator(announced(4), SERVER, ROSTER, range(4))
    with pytest.raises(DecodeError):
        server.receive("advertise", 0, data)
    signed = _messages.signed("announce", SERVER, data) + data
    with pytest.raises(RefusedError):
        Fleet(4).ask("advertise", 0, signed)


def test_an_announcement_round_trips() -> None:
    one = announced(9, coding=Grid(bits=8, clip=1.0).to_config())
    assert Announcement.opened(sealed(one), ROSTER.server) == one
