"""Rounds that the server signs, and whose replies are sealed: what both ends agree on for that.

A request says in its metadata what it is signed for: ``bound`` is the digest of the model and of
all that the clients are told (:func:`fedq.secagg.binding`), ``signature`` the server's over it. So
a device notices another model, a coarser codec or a smaller cohort than was announced to all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedq import wire
from fedq.envelope import Opener, Round
from fedq.errors import DecodeError, FedqError
from fedq.keys import Credentials, Roster
from fedq.layout import Vector
from fedq.secagg import Announcement, RefusedError, binding, run_name
from fedq.secagg._messages import SESSION_BYTES

_SIGNED = b"fedq request 1\0"


@dataclass(frozen=True)
class Sealing:
    """The server's end.

    Args:
      credentials: Its keys, and whose seals count.
    """

    credentials: Credentials

    def announced(
        self, request: Mapping[str, Any], cohort: int, weights: Vector, state: Vector
    ) -> dict[str, Any]:
        """Return what all clients of a round are told, signed.

        Args:
          request: What they are told beside the model.
          cohort: Clients that are asked.
          weights: (d,) float32, the model as they decode it.
          state: (s,) float32.
        """
        told = {**request, "sealed": True, "cohort": cohort}
        bound = binding(told, weights, state)
        signature = self.credentials.identity.signing.sign(_SIGNED + bound.encode())
        return {**told, "bound": bound, "signature": signature.hex()}

    def opener(self, about: Round) -> Opener:
        """Return what opens the replies to one request."""
        return Opener(self.credentials.identity, self.credentials.roster, about)


def check(metadata: Mapping[str, Any], weights: Vector, state: Vector, roster: Roster) -> None:
    """Check that a request, and the model in it, is what the server announced to all.

    Raises:
      RefusedError: If it is not signed, or not what was signed.
    """
    bound = binding(metadata, weights, state)
    try:
        signature = bytes.fromhex(str(metadata.get("signature")))
        key = Ed25519PublicKey.from_public_bytes(roster.server.signing)
        key.verify(signature, _SIGNED + bound.encode())
    except (InvalidSignature, ValueError):
        raise RefusedError("the request is not signed by our server") from None
    if metadata.get("bound") != bound or metadata.get("sealed") is not True:
        raise RefusedError("the request asks for no seal, or for one of another round")


def requested(blob: bytes) -> Round | None:
    """Return what the reply to a request must be sealed for, None if it asks for no seal."""
    request = wire.peek(blob)
    if request.metadata.get("sealed") is not True:
        return None
    if not blob.startswith(wire.SECURE_MAGIC):
        return of_request(request.metadata)
    phase, number = str(request.metadata.get("phase")), request.metadata.get("round")
    if not request.parts or not isinstance(number, int):
        raise DecodeError("a phase of secure aggregation without a message")
    first = bytes(request.parts[0])
    if phase in ("advertise", "clear"):
        session = Announcement.opened(first, None).session_bytes
    else:
        session = first[:SESSION_BYTES]
    return of_phase(session, phase, number)


def of_request(metadata: Mapping[str, Any]) -> Round:
    """Return what the reply to a request of an ordinary round belongs to."""
    try:
        codec = json.dumps(metadata["codec"], sort_keys=True).encode()
        bound = bytes.fromhex(metadata["bound"])
        return Round.of(run_name(metadata), int(metadata["round"]), bound, codec)
    except (KeyError, TypeError, ValueError):
        raise FedqError("the request does not say what a seal would be for") from None


def of_phase(session: bytes, phase: str, server_round: int) -> Round:
    """Return what the reply to a phase of secure aggregation belongs to."""
    return Round.of(session.hex(), server_round, phase.encode(), b"secure aggregation")
