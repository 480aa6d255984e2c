"""Lies against envelopes, signed requests and secure aggregation, told to the real parties.

Each lie is a function that raises a named error if it is refused, and returns if it is believed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fedq import sealing
from fedq.envelope import Opener, Round, seal
from fedq.errors import DecodeError
from fedq.keys import Credentials, SimulatedRoster, simulated
from fedq.secagg import PHASES, Announcement, Coordinator, Party, RefusedError, _messages

Lie = Callable[[], Any]
REFUSALS = (DecodeError, RefusedError)
_ROSTER = SimulatedRoster(0)
_SERVER = simulated(0)
_CLIENTS, _THRESHOLD = 6, 4
_PARTS = ((5, 7), (2, 40))


def believed(lies: Mapping[str, Lie]) -> list[str]:
    """Return the lies that no error refused; any error but a named one counts as believed."""
    found = []
    for name, lie in lies.items():
        try:
            lie()
        except REFUSALS:
            continue
        except Exception as error:  # whatever else escapes would end a round
            found.append(f"{name} ({type(error).__name__})")
        else:
            found.append(name)
    return found


# --- a client or a network lies about sealed updates ---------------------------------------------

_ABOUT = Round.of("run", 3, b"model", b"codec")
_PAYLOAD = b"an update of a device, as its codec wrote it"


def honest_envelope() -> None:
    """Open what a device sealed; fails if the honest way does not work."""
    _opener().open(_sealed(), 1000)


def envelopes() -> dict[str, Lie]:
    """Return lies about sealed updates."""
    blob = _sealed()
    flipped = {
        f"bit {at} flipped": bytes([*blob[:at], blob[at] ^ 1, *blob[at + 1 :]])
        for at in range(0, len(blob), 7)
    }
    blobs = {
        **flipped,
        "truncated": blob[:-1],
        "longer": blob + b"\0",
        "empty": b"",
        "sealed by another device": _sealed(client=8, signer=7),
        "of a device that was not asked": _sealed(client=9),
        "of another run": _sealed(dataclasses.replace(_ABOUT, run=bytes(16))),
        "of an earlier round": _sealed(dataclasses.replace(_ABOUT, number=2)),
        "of another model": _sealed(dataclasses.replace(_ABOUT, base=bytes(32))),
        "in another codec": _sealed(dataclasses.replace(_ABOUT, codec=bytes(32))),
        "for another server": _sealed(server=1),
    }

    def replayed() -> None:
        opener = _opener()
        opener.open(blob, 1000)
        opener.open(blob, 1000)

    def opened(data: bytes) -> Lie:
        return lambda: _opener().open(data, 1000)

    lies: dict[str, Lie] = {name: opened(data) for name, data in blobs.items()}
    return {**lies, "too long": lambda: _opener().open(blob, 10), "replayed": replayed}


def _sealed(
    about: Round = _ABOUT, client: int = 7, signer: int | None = None, server: int = 0
) -> bytes:
    identity = simulated(0, client if signer is None else signer)
    return seal(_PAYLOAD, about, client=client, identity=identity, server=simulated(server).public)


def _opener() -> Opener:
    return Opener(_SERVER, _ROSTER, _ABOUT, {7, 8})


# --- a server lies about the round ---------------------------------------------------------------


def honest_request() -> None:
    """Check a request as it was signed."""
    sealing.check(*_request(), _ROSTER)


def downgrades() -> dict[str, Lie]:
    """Return requests that are not what the server signed for all."""
    changes: dict[str, Mapping[str, Any]] = {
        "a coarser codec": {"codec": {"name": "sign"}},
        "a smaller cohort": {"cohort": 2},
        "another round": {"round": 2},
        "without a seal": {"sealed": False},
        "without a signature": {"signature": None},
        "with a made-up signature": {"signature": "00" * 64},
        "bound to something else": {"bound": "00" * 32},
        "with an option more": {"more": 1},
    }

    def checked(change: Mapping[str, Any], shift: float = 0.0, roster: int = 0) -> Lie:
        metadata, weights, state = _request(**change)
        moved = (weights + np.float32(shift)).astype(np.float32)
        return lambda: sealing.check(metadata, moved, state, SimulatedRoster(roster))

    lies = {name: checked(change) for name, change in changes.items()}
    return {
        **lies,
        "another model": checked({}, shift=1.0),
        "of another server": checked({}, roster=1),
    }


def _request(**changes: Any) -> tuple[dict[str, Any], Any, Any]:
    weights, state = np.ones(5, np.float32), np.zeros(2, np.float32)
    told = {"round": 1, "seed": 0, "codec": {"name": "uniform", "bits": 8}}
    signed = sealing.Sealing(Credentials(_SERVER, _ROSTER)).announced(told, 10, weights, state)
    return {**signed, **changes}, weights, state


# --- a server lies in secure aggregation ---------------------------------------------------------


class _Fleet:
    """Honest parties, and an honest server up to a phase in which it begins to lie."""

    def __init__(self) -> None:
        self.parties = {i: Party(i, simulated(0, i).signing, _ROSTER) for i in range(_CLIENTS)}

    def ask(self, phase: str, client: int, message: bytes) -> bytes:
        values = [[np.ones(size, np.int64) for size, _ in _PARTS]] if phase == "mask" else []
        answer: bytes = getattr(self.parties[client], phase)(message, *values)
        return answer

    def until(self, phase: str, announcement: Announcement) -> dict[int, bytes]:
        """Play the honest phases, and return the honest messages of this one."""
        server = Coordinator(announcement, _SERVER.signing, _ROSTER, range(_CLIENTS))
        for now in PHASES:
            messages = {int(str(who)): text for who, text in server.messages(now).items()}
            if now == phase:
                return messages
            for who, text in messages.items():
                server.receive(now, who, self.ask(now, who, text))
        server.sums()
        return {}


def honest_sum() -> None:
    """Play a whole round; fails if there is no sum."""
    _Fleet().until("", _announced())


def secure_sums() -> dict[str, Lie]:
    """Return lies of a server to the parties of a secure sum."""
    return dict(_secure_sums())


def _secure_sums() -> Iterator[tuple[str, Lie]]:
    def announced(message: bytes) -> Lie:
        return lambda: _Fleet().ask("advertise", 0, message)

    own = _announced()
    yield "an announcement without a signature", announced(bytes(64) + _signed(own)[64:])
    yield "signed by another", announced(own.sealed(simulated(0, 3).signing))
    yield "a cohort of two", announced(_signed(_announced(clients=2, neighbours=2, threshold=2)))
    yield "a threshold of half", announced(_signed(_announced(threshold=3)))
    yield "masks with nobody", announced(_signed(_announced(neighbours=0, threshold=1)))

    def told(phase: str, change: Callable[[bytes], bytes]) -> Lie:
        def lie() -> None:
            fleet = _Fleet()
            message = fleet.until(phase, _announced())[0]
            fleet.ask(phase, 0, change(message))

        return lie

    size, session = _messages.Advert.SIZE, _messages.SESSION_BYTES

    def listed(*members: int) -> Callable[[bytes], bytes]:
        bitmap = _messages.to_bitmap(members, _CLIENTS)
        return lambda message: message[:session] + bitmap + message[session + 1 :]

    def foreign(message: bytes) -> bytes:
        share, mask, seed = (simulated(9, n).public.agreement for n in range(3))
        made = _messages.Advert.make(2, share, mask, seed, simulated(9, 2).signing, bytes(32))
        advert = made.packed
        place = session + 2 * size
        return message[:place] + advert + message[place + size :]

    yield "keys of a stranger", told("share", foreign)
    yield "half of the adverts", told("share", lambda m: m[: session + 2 * size])
    yield "one advert twice", told("share", lambda m: m + m[-size:])
    yield "too few who dealt", told("mask", listed(0, 1, 2))
    yield "a list without the client", told("mask", listed(1, 2, 3, 4, 5))
    yield "a sum of two", told("agree", listed(0, 1))
    yield "survivors that nobody attests", told("unmask", lambda m: m[:session])
    yield "one attestation five times", told("unmask", lambda m: m[:session] + 5 * m[session:][:34])

    def twice() -> None:
        fleet = _Fleet()
        fleet.until("", _announced())
        # A second sum of the round, of another model: the difference would be one client's.
        fleet.until("", _announced(session="a" * 32, base="1" * 64))

    yield "a second sum in a round", twice


def _announced(**changes: Any) -> Announcement:
    defaults: dict[str, Any] = {
        "run": "test",
        "round": 1,
        "session": f"{_CLIENTS:032x}",
        "clients": _CLIENTS,
        "neighbours": _CLIENTS,
        "threshold": _THRESHOLD,
        "parts": _PARTS,
        "coding": {},
        "base": "0" * 64,
    }
    return Announcement(**{**defaults, **changes})


def _signed(announcement: Announcement) -> bytes:
    return announcement.sealed(_SERVER.signing)
