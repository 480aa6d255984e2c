"""What the five phases of secure aggregation send, byte by byte.

Each message begins with the round's session, 16 random bytes of the server. Then::

    phase      server -> client                         client -> server
    advertise  signature 64, announcement (JSON)        advert: client 8, share key 32, mask key 32,
                                                        commitment 32, signature 64
    share      all adverts, by client                   per neighbour: commitments to two shares,
                                                        2 x 16; per other neighbour: shares, sealed,
                                                        80
    mask       bitmap of those who shared               masked integers, packed
    agree      bitmap of those whose vectors are in,    per other neighbour: tag 16 over both
               then shares dealt to this client,        bitmaps
               sealed, 80 each
    unmask     per neighbour who agreed: index 2,       bitmap of shares that are here,
               tag 16                                   then the shares, 32 each

The first message has no session before its signature: the announcement names it. Indices are places
among the adverts, bitmaps have a bit for each. Sizes are checked against what the receiver knows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import itertools
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedq import registry
from fedq.errors import ConfigError, DecodeError
from fedq.keys import PublicKeys, Roster
from fedq.layout import Vector
from fedq.secagg._words import Segment

#: In the order of a round.
PHASES = ("advertise", "share", "mask", "agree", "unmask")
SESSION_BYTES, SIGNATURE_BYTES, COMMITMENT_BYTES, TAG_BYTES = 16, 64, 16, 16
SEALED_BYTES = 2 * 32 + 16
MAX_CLIENTS = 1 << 16
_SIGNED = {what: f"fedq secagg {what} 1\0".encode() for what in ("announce", "advert")}


def signed(what: str, key: Ed25519PrivateKey, content: bytes) -> bytes:
    """Return a signature over content of a kind, so that no kind passes for another."""
    return key.sign(_SIGNED[what] + content)


def genuine(what: str, keys: PublicKeys | None, signature: bytes, content: bytes) -> bool:
    """Whether a signature is that of the keys' owner."""
    if keys is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(keys.signing).verify(signature, _SIGNED[what] + content)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What a round is: the same, and signed, for all clients of it.

    Attributes:
      run: Name of the run, the same if it is resumed.
      round: From 1.
      session: 32 hexadecimal digits, fresh for each attempt at a round.
      clients: Asked to take part, at most.
      neighbours: Others that each shares masks with, at most.
      threshold: Shares that uncover a key.
      parts: Integers of a client and their bits, per part: sizes are no client's to say.
      coding: How an update becomes integers, JSON-ready; the protocol does not look into it.
      base: SHA-256 of the model and of what to do with it, hexadecimal.
    """

    run: str
    round: int
    session: str
    clients: int
    neighbours: int
    threshold: int
    parts: tuple[tuple[int, int], ...]
    coding: Any
    base: str

    def __post_init__(self) -> None:
        numbers = self.round, self.neighbours, self.threshold
        if min(numbers) < 0 or not 1 <= self.clients <= MAX_CLIENTS:
            raise ConfigError("an announced number is out of range")
        for part in self.parts:
            if len(part) != 2 or part[0] < 0 or not 1 <= part[1] <= 64:
                raise ConfigError("an announced part is no number of integers and of their bits")
        for text, digits in ((self.session, 32), (self.base, 64)):
            if len(text) != digits or set(text) - set("0123456789abcdef"):
                raise ConfigError("an announced digest is not hexadecimal")

    @property
    def nearby(self) -> int:
        """Members of a full neighbourhood, the client itself included."""
        return min(self.neighbours, self.clients - 1) + 1

    @property
    def session_bytes(self) -> bytes:
        """The session as messages begin with it."""
        return bytes.fromhex(self.session)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The parts of a masked vector."""
        return tuple(Segment(size, bits) for size, bits in self.parts)

    def sealed(self, key: Ed25519PrivateKey) -> bytes:
        """Return the signed message."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return signed("announce", key, content) + content

    @classmethod
    def opened(cls, message: bytes, server: PublicKeys | None) -> Announcement:
        """Return the announcement of a message that the server signed.

        Args:
          message: As :meth:`sealed` made it.
          server: Its public keys; None reads a message that was checked before.

        Raises:
          DecodeError: If the signature is another's, or the content none of ours.
        """
        signature, content = message[:SIGNATURE_BYTES], message[SIGNATURE_BYTES:]
        if server is not None and not genuine("announce", server, signature, content):
            raise DecodeError("the announcement of the round is not signed by our server")
        try:
            config = json.loads(content)
            hints = typing.get_type_hints(cls)
            return cls(
                **{
                    f.name: registry.convert(config[f.name], hints[f.name], f.name)
                    for f in dataclasses.fields(cls)
                }
            )
        except (ConfigError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DecodeError(f"the announcement of the round is malformed: {error}") from None


@dataclass(frozen=True)
class Advert:
    """One client's public keys for a session."""

    client: int
    share_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes

    SIZE: ClassVar[int] = 8 + 3 * 32 + SIGNATURE_BYTES

    @classmethod
    def make(
        cls,
        client: int,
        share_key: bytes,
        mask_key: bytes,
        commitment: bytes,
        identity: Ed25519PrivateKey,
        announced: bytes,
    ) -> Advert:
        """Return a signed advert, bound to the digest of the announcement."""
        body = client.to_bytes(8, "big") + share_key + mask_key + commitment
        return cls(
            client, share_key, mask_key, commitment, signed("advert", identity, announced + body)
        )

    @property
    def body(self) -> bytes:
        """What is signed."""
        return self.client.to_bytes(8, "big") + self.share_key + self.mask_key + self.commitment

    @property
    def packed(self) -> bytes:
        """The advert on the wire."""
        return self.body + self.signature

    @classmethod
    def parse(cls, data: bytes) -> Advert:
        """Return the advert of exactly :attr:`SIZE` bytes."""
        client = int.from_bytes(data[:8], "big")
        return cls(client, data[8:40], data[40:72], data[72:104], data[104:])

    def genuine(self, roster: Roster, announced: bytes) -> bool:
        """Whether the client that it names has signed it for this announcement."""
        return genuine("advert", roster.device(self.client), self.signature, announced + self.body)


def parse_adverts(data: bytes) -> list[Advert]:
    """Return adverts in the order of their clients, each there once."""
    if len(data) % Advert.SIZE:
        raise DecodeError("the adverts of a round are truncated")
    adverts = [Advert.parse(data[at : at + Advert.SIZE]) for at in range(0, len(data), Advert.SIZE)]
    if any(a.client >= b.client for a, b in itertools.pairwise(adverts)):
        raise DecodeError("the adverts of a round name a client twice, or are not in order")
    return adverts


def digest(what: str, *pieces: bytes) -> bytes:
    """Return SHA-256 over pieces of fixed sizes, or one piece."""
    return hashlib.sha256(f"fedq secagg {what}\0".encode() + b"".join(pieces)).digest()


def tag(key: bytes, sender: int, view: bytes) -> bytes:
    """Return what shows one neighbour that another goes on with the same list of survivors.

    A MAC under the key of the pair says as much between the two as a signature, a hundred times
    faster.
    """
    message = b"fedq secagg agree\0" + sender.to_bytes(4, "big") + view
    return hmac.digest(key, message, "sha256")[:TAG_BYTES]


def commitment_to_share(share: bytes) -> bytes:
    """Return what binds a dealer to a share: enough to know a wrong one."""
    return digest("share", share)[:COMMITMENT_BYTES]


def agreed_key(own: X25519PrivateKey, peer: bytes, context: bytes, info: bytes, size: int) -> bytes:
    """Return a key that two clients share: X25519 (RFC 7748), then HKDF-SHA256 (RFC 5869).

    Raises:
      DecodeError: If the peer's key is a point that makes the secret known to all.
    """
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise DecodeError("a client's key is not one") from None
    return HKDF(hashes.SHA256(), size, context, info).derive(secret)


def own_key(seed: bytes, context: bytes, size: int) -> bytes:
    """Return the key of a client's own mask."""
    return HKDF(hashes.SHA256(), size, context, b"fedq secagg own mask").derive(seed)


def to_bitmap(indices: Iterable[int], count: int) -> bytes:
    """Return a bitmap of ``count`` bits.

    >>> from_bitmap(to_bitmap([0, 9], 10), 10)
    [0, 9]
    """
    return sum(1 << i for i in set(indices)).to_bytes((count + 7) // 8, "little")


def from_bitmap(data: bytes, count: int) -> list[int]:
    """Return the indices of the bits that are set."""
    bits = int.from_bytes(data, "little")
    if len(data) != (count + 7) // 8 or bits >> count:
        raise DecodeError(f"not a bitmap of {count} bits")
    return [i for i in range(count) if bits >> i & 1]


def after_session(message: bytes | memoryview, session: bytes) -> memoryview:
    """Return what follows the session of a message.

    Raises:
      DecodeError: If it belongs to another session.
    """
    view = memoryview(message)
    if view[:SESSION_BYTES] != session:
        raise DecodeError("a message of another session of secure aggregation")
    return view[SESSION_BYTES:]


#: What may differ between the requests of a round: how the same model is coded for whom.
_VARYING = {"keep", "base", "context", "bound", "signature"}


def binding(metadata: Mapping[str, Any], weights: Vector, state: Vector) -> str:
    """Return the digest of a model and of what to do with it, hexadecimal.

    All clients of a sum check it, so that none can be given a model, or a task, of its own: that
    would make its update stand out in the sum (Pasquini et al. 2022, "Eluding secure aggregation in
    federated learning via model inconsistency").
    """
    text = _same_for_all(metadata)
    numbers = [vector.astype("<f4").tobytes() for vector in (weights, state)]
    return digest("base", *(hashlib.sha256(piece).digest() for piece in (text, *numbers))).hex()


def run_name(metadata: Mapping[str, Any]) -> str:
    """Return a run's name, the same after it is resumed: a digest of all but the round."""
    return digest("run", _same_for_all({**metadata, "round": None, "cohort": None})).hex()[:32]


def _same_for_all(metadata: Mapping[str, Any]) -> bytes:
    task = {key: value for key, value in metadata.items() if key not in _VARYING}
    return json.dumps(task, sort_keys=True, separators=(",", ":")).encode()
