"""Sealed updates: opened once, by the server, for the round that they were sealed for."""

from __future__ import annotations

import dataclasses
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedq.envelope import OVERHEAD_BYTES, SUITES, Opener, Round, seal
from fedq.errors import DecodeError
from fedq.keys import Identity, SignedRoster, SimulatedRoster, simulated

SERVER = simulated(0)
ABOUT = Round.of("run", 3, b"model", b"codec")
PAYLOAD = b"an update of a device, as its codec wrote it"


def sealed(
    payload: bytes = PAYLOAD, about: Round = ABOUT, client: int = 7, **options: int
) -> bytes:
    identity = simulated(0, options.pop("signer", client))
    return seal(payload, about, client=client, identity=identity, server=SERVER.public, **options)


def opener(**changes: object) -> Opener:
    return dataclasses.replace(Opener(SERVER, SimulatedRoster(0), ABOUT, {7, 8}), **changes)  # type: ignore[arg-type]


@given(st.binary(max_size=300), st.sampled_from(sorted(SUITES)))
def test_what_is_sealed_is_opened(payload: bytes, suite: int) -> None:
    blob = sealed(payload, suite=suite)
    assert len(blob) == len(payload) + OVERHEAD_BYTES <= len(payload) + 220
    assert opener().open(blob, len(payload)) == (7, payload)
    assert len(payload) < 4 or payload not in blob


def test_the_same_payload_never_looks_the_same() -> None:
    assert sealed()[-len(PAYLOAD) :] != sealed()[-len(PAYLOAD) :]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"number": 4}, "another round"),
        ({"run": bytes(16)}, "another run"),
        ({"base": bytes(32)}, "another model"),
        ({"codec": bytes(32)}, "another codec"),
    ],
)
def test_another_round_does_not_take_it(changes: dict[str, object], why: str) -> None:
    about = dataclasses.replace(ABOUT, **changes)  # type: ignore[arg-type]
    with pytest.raises(DecodeError, match=why):
        opener(about=about).open(sealed(), 1000)
    with pytest.raises(DecodeError, match=why):
        opener().open(sealed(about=about), 1000)


def test_a_replay_is_refused_and_a_later_sequence_is_not() -> None:
    one, first = opener(), sealed()
    one.open(first, 1000)
    with pytest.raises(DecodeError, match="opened before"):
        one.open(first, 1000)
    with pytest.raises(DecodeError, match="opened before"):
        one.open(sealed(), 1000)
    assert one.open(sealed(sequence=1), 1000) == (7, PAYLOAD)
    assert one.open(sealed(client=8), 1000) == (8, PAYLOAD)


def test_impostors_and_strangers() -> None:
    with pytest.raises(DecodeError, match="did not sign"):
        opener().open(sealed(client=8, signer=7), 1000)
    with pytest.raises(DecodeError, match="was not asked"):
        opener().open(sealed(client=9), 1000)
    roster = SignedRoster(1, SERVER.public).with_device(7, simulated(0, 7).public)
    assert opener(roster=roster).open(sealed(), 1000) == (7, PAYLOAD)
    with pytest.raises(DecodeError, match="not on the roster"):
        opener(roster=roster.without_device(7)).open(sealed(), 1000)
    rotated = roster.with_device(7, Identity.generate().public)
    with pytest.raises(DecodeError, match="did not sign"):
        opener(roster=rotated).open(sealed(), 1000)


def test_another_server_cannot_read_it() -> None:
    with pytest.raises(DecodeError, match="another server"):
        opener(identity=simulated(1)).open(sealed(), 1000)


def test_any_bit_that_changes_is_noticed() -> None:
    blob = sealed()
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 1 << at % 8
        with pytest.raises(DecodeError):
            opener().open(bytes(changed), 1000)


@given(st.binary(max_size=400))
def test_bytes_of_a_stranger_raise_a_named_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        opener().open(data, 1000)


@pytest.mark.parametrize("cut", [1, 16, len(PAYLOAD), OVERHEAD_BYTES])
def test_sizes(cut: int) -> None:
    with pytest.raises(DecodeError):
        opener().open(sealed()[:-cut], 1000)
    with pytest.raises(DecodeError, match="bytes"):
        opener().open(sealed(), len(PAYLOAD) - 1)


def test_a_failure_leaves_no_trace() -> None:
    """What was refused does not use up the sequence of the client that it names."""
    one = opener()
    changed = bytearray(sealed())
    changed[-1] ^= 1
    with pytest.raises(DecodeError):
        one.open(bytes(changed), 1000)
    assert one.open(sealed(), 1000) == (7, PAYLOAD)


def test_nothing_secret_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = os.urandom(64)
    texts = []
    for changes in (
        {"identity": simulated(1)},
        {"cohort": {1}},
        {"about": Round.of("", 1, b"", b"")},
    ):
        with pytest.raises(DecodeError) as caught:
            opener(**changes).open(sealed(secret), 1000)
        texts.append(f"{caught.value!r} {caught.value.__context__!r}")
    said = caplog.text + "".join(texts) + repr(SERVER) + repr(opener())
    assert secret.hex() not in said
    assert repr(secret)[2:20] not in said
    for key in (SERVER.signing, SERVER.agreement):
        assert key.private_bytes_raw().hex() not in said
        assert repr(key.private_bytes_raw())[2:20] not in said
