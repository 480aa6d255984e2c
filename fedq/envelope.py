"""Sealed updates: what a device says is readable for the server alone, and provably the device's.

An ephemeral-static X25519 exchange, HKDF and an AEAD seal the payload, as in HPKE's base mode (RFC
9180); an Ed25519 signature over header and ciphertext says whose it is. The header is readable, and
part of what is authenticated::

    "fE" | version u8 | suite u8 | run 16 | round u32 | client u64 | sequence u64
         | base 32 | codec 32 | ephemeral X25519 key 32 | signature 64 | ciphertext

in little-endian: 200 bytes, and a tag of 16. TLS ends where the first server does; this does not.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedq.errors import DecodeError
from fedq.keys import Identity, PublicKeys, Roster

MAGIC, VERSION = b"fE", 1
#: AES-256-GCM where the processor has instructions for it, ChaCha20-Poly1305 elsewhere.
SUITES: dict[int, Callable[[bytes], Any]] = {1: AESGCM, 2: ChaCha20Poly1305}
_HEADER = struct.Struct("<2sBB16sIQQ32s32s32s")
_SIGNATURE_BYTES, _TAG_BYTES = 64, 16
OVERHEAD_BYTES = _HEADER.size + _SIGNATURE_BYTES + _TAG_BYTES
_SIGNED, _INFO = b"fedq envelope 1\0", b"fedq envelope 1"


@dataclass(frozen=True)
class Round:
    """What an update belongs to; both ends know it.

    Attributes:
      run: 16 bytes, the run's name.
      number: The round.
      base: 32 bytes, digest of the model that it starts from.
      codec: 32 bytes, digest of how it is encoded.
    """

    run: bytes
    number: int
    base: bytes
    codec: bytes

    @classmethod
    def of(cls, run: str, number: int, base: bytes, codec: bytes) -> Round:
        """Return the round of a named run, a base and a codec given as they are."""
        digests = (hashlib.sha256(piece).digest() for piece in (run.encode(), base, codec))
        name, *others = digests
        return cls(name[:16], number, *others)


def seal(
    payload: bytes,
    about: Round,
    *,
    client: int,
    identity: Identity,
    server: PublicKeys,
    sequence: int = 0,
    suite: int = 1,
) -> bytes:
    """Seal a payload for the server.

    Args:
      payload: What only the server may read.
      about: The round.
      client: The sender's number on the roster.
      identity: The sender's secret keys.
      server: The server's public keys.
      sequence: Grows with each message of the round.
      suite: A key of :data:`SUITES`.

    Example:
      >>> from fedq.keys import SimulatedRoster, simulated
      >>> about = Round.of("run", 3, b"model", b"codec")
      >>> sealed = seal(b"secret", about, client=7, identity=simulated(0, 7),
      ...               server=simulated(0).public)
      >>> len(sealed) - len(b"secret") == OVERHEAD_BYTES
      True
      >>> opener = Opener(simulated(0), SimulatedRoster(0), about, {7})
      >>> opener.open(sealed, max_bytes=1000)
      (7, b'secret')
    """
    ephemeral = X25519PrivateKey.generate()
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        suite,
        about.run,
        about.number,
        client,
        sequence,
        about.base,
        about.codec,
        ephemeral.public_key().public_bytes_raw(),
    )
    secret = ephemeral.exchange(X25519PublicKey.from_public_bytes(server.agreement))
    cipher, nonce = _cipher(suite, secret, header, server)
    ciphertext: bytes = cipher.encrypt(nonce, payload, header)
    return header + identity.signing.sign(_to_sign(header, ciphertext)) + ciphertext


@dataclass
class Opener:
    """Opens what a round's cohort sealed, each message once.

    Attributes:
      identity: The server's secret keys.
      roster: Whose signatures count.
      about: The round.
      cohort: Clients that were asked; None is anyone on the roster.
      seen: (client, sequence) of what was opened.
    """

    identity: Identity
    roster: Roster
    about: Round
    cohort: set[int] | None = None
    seen: set[tuple[int, int]] = field(default_factory=set)

    def open(self, blob: bytes | memoryview, max_bytes: int) -> tuple[int, bytes]:
        """Return who sealed a payload, and the payload.

        Checks come in the order of their cost: nothing is decrypted that is not signed.

        Args:
          blob: As :func:`seal` made it.
          max_bytes: A longer payload is refused.

        Raises:
          DecodeError: If it is malformed, of another round, base or codec, not signed by a device
            on the roster that was asked, seen before, or changed on the way.
        """
        blob = bytes(blob)
        if not OVERHEAD_BYTES <= len(blob) <= OVERHEAD_BYTES + max_bytes:
            raise DecodeError(f"a sealed update of {len(blob)} bytes")
        header, rest = blob[: _HEADER.size], blob[_HEADER.size :]
        signature, ciphertext = rest[:_SIGNATURE_BYTES], rest[_SIGNATURE_BYTES:]
        magic, version, suite, run, number, client, sequence, base, codec, ephemeral = (
            _HEADER.unpack(header)
        )
        if magic != MAGIC or version != VERSION or suite not in SUITES:
            raise DecodeError("not a sealed update of this version")
        about = self.about
        for what, said, expected in (
            ("run", run, about.run),
            ("round", number, about.number),
            ("model", base, about.base),
            ("codec", codec, about.codec),
        ):
            if said != expected:
                raise DecodeError(f"a sealed update for another {what}")
        keys = self.roster.device(client)
        if keys is None or (self.cohort is not None and client not in self.cohort):
            raise DecodeError(f"client {client} is not on the roster, or was not asked")
        try:
            key = Ed25519PublicKey.from_public_bytes(keys.signing)
            key.verify(signature, _to_sign(header, ciphertext))
        except InvalidSignature:
            raise DecodeError(f"a sealed update that client {client} did not sign") from None
        if (client, sequence) in self.seen:
            raise DecodeError(f"a sealed update of client {client} that was opened before")
        try:
            secret = self.identity.agreement.exchange(X25519PublicKey.from_public_bytes(ephemeral))
            cipher, nonce = _cipher(suite, secret, header, self.identity.public)
            payload: bytes = cipher.decrypt(nonce, ciphertext, header)
        except (InvalidTag, ValueError):
            raise DecodeError("a sealed update for another server") from None
        self.seen.add((client, sequence))
        return client, payload


def _to_sign(header: bytes, ciphertext: bytes) -> bytes:
    # A digest of the ciphertext: Ed25519 itself would go through it twice, more slowly.
    return _SIGNED + header + hashlib.sha256(ciphertext).digest()


def _cipher(suite: int, secret: bytes, header: bytes, server: PublicKeys) -> tuple[Any, bytes]:
    """Return the AEAD under a key of this header alone, and its nonce."""
    salt = hashlib.sha256(header + server.agreement).digest()
    derived = HKDF(hashes.SHA256(), 44, salt, _INFO).derive(secret)
    return SUITES[suite](derived[:32]), derived[32:]
