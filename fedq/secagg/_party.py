"""A client's side of secure aggregation: bytes in, bytes out, and what it refuses."""

from __future__ import annotations

import dataclasses
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedq.errors import ConfigError, DecodeError, FedqError
from fedq.keys import SMALLEST_SUM, Roster
from fedq.secagg import _messages, _shamir, _words
from fedq.secagg._graph import neighbourhoods
from fedq.secagg._grid import Integers
from fedq.secagg._messages import PHASES, Advert, Announcement

#: Rounds whose sums a client remembers to have helped to uncover.
REMEMBERED = 64


class RefusedError(FedqError):
    """The client does not go on: its server asks for what it must not get, or does not explain."""


@dataclass
class _Session:
    """One attempt at a round; secrets leave only as shares, and end with it."""

    phase: int  #: index of the phase that comes next
    announcement: bytes
    share_secret: bytes
    mask_secret: bytes
    own_seed: bytes
    adverts: bytes = b""
    dealers: bytes = b""
    survivors: bytes = b""
    #: By neighbour: the key under which shares go both ways.
    keys: dict[int, bytes] = dataclasses.field(default_factory=dict)
    #: By dealer, this client included: a share of its own seed, then one of its mask secret.
    shares: dict[int, bytes] = dataclasses.field(default_factory=dict)


class Party:
    """One client in one round after another.

    Each method answers one message of the server. Between them, :meth:`memory` is all that must be
    kept, and it is secret. A client refuses with :class:`RefusedError`:

    - an announcement that its server did not sign, or a message that does not fit the announced
      round, or comes out of turn;
    - a cohort below ``smallest``, or a threshold of half a neighbourhood or less;
    - neighbours that are unknown, revoked, or have not signed their keys for this very round;
    - to uncover anything before a threshold of its neighbours attest the same list of survivors;
    - a second sum in a round, unless it is the same one (as after a restart of the server).

    That list is one bitmap, so that nobody can be named both alive and dead.

    Args:
      client: Its number.
      identity: Signs its keys.
      roster: Whose signatures count.
      smallest: Clients that a sum must have at least.
      memory: What :meth:`memory` returned after the last message.

    Reference:
      Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning",
      figure 4 (with all steps against active adversaries).
    """

    def __init__(
        self,
        client: int,
        identity: Ed25519PrivateKey,
        roster: Roster,
        *,
        smallest: int = SMALLEST_SUM,
        memory: bytes | None = None,
    ) -> None:
        self.client, self.identity, self.roster = client, identity, roster
        self.smallest = smallest
        self._session: _Session | None = None
        self._spent: dict[str, str] = {}
        self._own = secrets.token_bytes(32)
        if memory:
            try:
                kept = json.loads(memory)
                self._spent = dict(kept["spent"])
                self._own = bytes.fromhex(kept["own"])
                self._session = _thawed(kept["session"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise RefusedError(
                    f"what client {client} remembers of secure aggregation is damaged; remove its "
                    f"file secret/{client} in its state directory"
                ) from None

    def memory(self) -> bytes:
        """Return what must be kept until the next message; secret while a round is under way."""
        session = None if self._session is None else _frozen(self._session)
        kept = {"own": self._own.hex(), "spent": self._spent, "session": session}
        return json.dumps(kept).encode()

    def secret(self, purpose: bytes) -> bytes:
        """Return 32 bytes that nobody else can guess, the same whenever the purpose is."""
        return hmac.digest(self._own, b"fedq secagg secret\0" + purpose, "sha256")

    # --- the five phases ---------------------------------------------------------------------

    def advertise(self, message: bytes) -> bytes:
        """Answer the announcement of a round with fresh public keys."""
        self._session = None
        try:
            announced = Announcement.opened(message, self.roster.server)
        except FedqError as error:
            raise RefusedError(str(error)) from None
        if announced.clients < self.smallest:
            raise RefusedError(
                f"a round of {announced.clients} clients; this one takes part in sums of at least "
                f"{self.smallest}"
            )
        if announced.nearby < self.smallest:
            raise RefusedError(f"masks shared with {announced.nearby - 1} others hide nothing")
        if not announced.nearby < 2 * announced.threshold <= 2 * announced.nearby:
            raise RefusedError(
                f"a threshold of {announced.threshold} in neighbourhoods of {announced.nearby}: it "
                "must be more than half"
            )
        session = _Session(1, message, _shamir.draw(), _shamir.draw(), _shamir.draw())
        self._session = session
        advert = Advert.make(
            self.client,
            _public(session.share_secret),
            _public(session.mask_secret),
            _messages.digest("seed", session.own_seed),
            self.identity,
            _messages.digest("announcement", message),
        )
        return announced.session_bytes + advert.packed

    def share(self, message: bytes) -> bytes:
        """Answer the adverts of all clients with shares of this one's secrets."""
        session, announced = self._turn("share")
        session.adverts = self._content(message, announced)
        cohort = _Cohort.of(session, announced, self.client)
        if not self.smallest <= len(cohort.adverts) <= announced.clients:
            raise RefusedError(f"{len(cohort.adverts)} clients advertised their keys")
        self._check_near(cohort, cohort.near, announced)
        known = _messages.digest("announcement", session.announcement)
        for i in cohort.others:
            if not cohort.adverts[i].genuine(self.roster, known):
                raise RefusedError(
                    f"the keys of client {cohort.adverts[i].client} are not signed by a device on "
                    "the roster"
                )
        holders = [i + 1 for i in cohort.near]
        seeds = _shamir.split(session.own_seed, announced.threshold, holders)
        masks = _shamir.split(session.mask_secret, announced.threshold, holders)
        secret = X25519PrivateKey.from_private_bytes(session.share_secret)
        pieces = [
            _messages.commitment_to_share(shares[x]) for x in holders for shares in (seeds, masks)
        ]
        for i in cohort.near:
            both = seeds[i + 1] + masks[i + 1]
            if i == cohort.index:
                session.shares[i] = both
                continue
            key = _messages.agreed_key(
                secret, cohort.adverts[i].share_key, cohort.context, b"fedq secagg shares", 32
            )
            session.keys[i] = key
            nonce = _nonce(cohort.index)
            pieces.append(ChaCha20Poly1305(key).encrypt(nonce, both, cohort.context))
        session.phase += 1
        return announced.session_bytes + b"".join(pieces)

    def expects(self, message: bytes) -> Announcement:
        """Return what the round announced, if a message to mask belongs to it; changes nothing.

        For a check of the model before training.
        """
        session, announced = self._turn("mask")
        cohort = _Cohort.of(session, announced, self.client)
        dealers = self._bitmap(self._content(message, announced), cohort)
        self._check_near(cohort, dealers, announced)
        return announced

    def mask(self, message: bytes, integers: Sequence[Integers]) -> bytes:
        """Answer the list of those who dealt shares with the masked integers of this client.

        Args:
          message: The list.
          integers: As :meth:`fedq.secagg.Grid.encode` returns them.
        """
        announced = self.expects(message)
        assert self._session is not None
        session = self._session
        segments = announced.segments
        if [a.size for a in integers] != [s.size for s in segments]:
            raise ConfigError("the integers are not of the announced sizes")
        session.dealers = self._content(message, announced)
        cohort = _Cohort.of(session, announced, self.client)
        secret = X25519PrivateKey.from_private_bytes(session.mask_secret)
        plus = [_messages.own_key(session.own_seed, cohort.context, _words.KEY_BYTES)]
        minus: list[bytes] = []
        dealers = set(self._bitmap(session.dealers, cohort))
        for i in cohort.others:
            if i in dealers:
                key = _messages.agreed_key(
                    secret,
                    cohort.adverts[i].mask_key,
                    cohort.context,
                    b"fedq secagg pair mask",
                    _words.KEY_BYTES,
                )
                (plus if i < cohort.index else minus).append(key)
        words = _words.wrap(integers, segments)
        _words.add_keystreams(words, plus, minus)
        session.phase += 1
        return announced.session_bytes + _words.pack(words, segments)

    def agree(self, message: bytes) -> bytes:
        """Attest the list of those whose integers arrived, and keep the shares dealt here."""
        session, announced = self._turn("agree")
        cohort = _Cohort.of(session, announced, self.client)
        content = self._content(message, announced)
        size = len(session.dealers)
        session.survivors = content[:size]
        survivors = self._bitmap(session.survivors, cohort)
        dealers = set(self._bitmap(session.dealers, cohort))
        if not dealers.issuperset(survivors):
            raise RefusedError("a client without a mask is said to have sent masked integers")
        if len(survivors) < self.smallest:
            raise RefusedError(
                f"a sum of {len(survivors)} clients; this one takes part in sums of at least "
                f"{self.smallest}"
            )
        self._check_near(cohort, survivors, announced)
        if self._spent.get(_name(announced)) not in (None, self._what(cohort, survivors)):
            raise RefusedError(f"another sum of round {announced.round} was uncovered before")
        dealt = [i for i in cohort.others if i in dealers]
        sealed = content[size:]
        if len(sealed) != len(dealt) * _messages.SEALED_BYTES:
            raise RefusedError("the shares dealt to this client are truncated, or too many")
        for place, i in enumerate(dealt):
            at = place * _messages.SEALED_BYTES
            try:  # a dealer that lies here is found out where its shares are missing
                session.shares[i] = ChaCha20Poly1305(session.keys[i]).decrypt(
                    _nonce(i), sealed[at : at + _messages.SEALED_BYTES], cohort.context
                )
            except InvalidTag:
                continue
        session.phase += 1
        view = cohort.context + session.dealers + session.survivors
        tags = (_messages.tag(session.keys[i], cohort.index, view) for i in cohort.others)
        return announced.session_bytes + b"".join(tags)

    def unmask(self, message: bytes) -> bytes:
        """Give the shares that uncover the sum, and forget the session.

        Of a survivor that is a share of its own mask's seed, of another dealer one of its mask
        secret; never both.
        """
        session, announced = self._turn("unmask")
        cohort = _Cohort.of(session, announced, self.client)
        view = cohort.context + session.dealers + session.survivors
        survivors = set(self._bitmap(session.survivors, cohort))
        proofs = self._content(message, announced)
        size = 2 + _messages.TAG_BYTES
        agreed = {cohort.index}
        for at in range(0, len(proofs) - size + 1, size):
            i = int.from_bytes(proofs[at : at + 2], "big")
            if len(agreed) >= announced.threshold:
                break
            if i not in survivors or i not in session.keys:
                continue
            if hmac.compare_digest(
                _messages.tag(session.keys[i], i, view), proofs[at + 2 : at + size]
            ):
                agreed.add(i)
        if len(agreed) < announced.threshold:
            self._session = None
            raise RefusedError(
                f"{len(agreed)} of {announced.threshold} neighbours attest this list of survivors"
            )
        dealers = set(self._bitmap(session.dealers, cohort))
        asked = [i for i in cohort.near if i in dealers]
        here = [place for place, i in enumerate(asked) if i in session.shares]
        shares = []
        for place in here:
            seed, mask = session.shares[asked[place]][:32], session.shares[asked[place]][32:]
            shares.append(seed if asked[place] in survivors else mask)
        self._spent[_name(announced)] = self._what(cohort, sorted(survivors))
        self._spent = dict(list(self._spent.items())[-REMEMBERED:])
        self._session = None
        return announced.session_bytes + _messages.to_bitmap(here, len(asked)) + b"".join(shares)

    # --- checks ------------------------------------------------------------------------------

    def _turn(self, phase: str) -> tuple[_Session, Announcement]:
        session = self._session
        if session is None or PHASES[session.phase] != phase:
            raise RefusedError(f"'{phase}' comes out of turn; the round must begin anew")
        return session, Announcement.opened(session.announcement, None)

    def _content(self, message: bytes, announced: Announcement) -> bytes:
        try:
            return bytes(_messages.after_session(message, announced.session_bytes))
        except DecodeError as error:
            raise RefusedError(str(error)) from None

    def _bitmap(self, data: bytes, cohort: _Cohort) -> list[int]:
        try:
            indices = _messages.from_bitmap(data, len(cohort.adverts))
        except DecodeError as error:
            raise RefusedError(str(error)) from None
        if cohort.index not in indices:
            raise RefusedError("this client is not on the list that it is asked to go on with")
        return indices

    def _check_near(self, cohort: _Cohort, present: Sequence[int], announced: Announcement) -> None:
        near = len(set(present).intersection(cohort.near))
        if near < announced.threshold:
            raise RefusedError(
                f"{near} clients of this one's neighbourhood are left, {announced.threshold} are "
                "needed"
            )

    def _what(self, cohort: _Cohort, survivors: Sequence[int]) -> str:
        """Return what a sum is of: the same model, task and clients give the same sum again."""
        announced = cohort.announced
        coding = json.dumps(announced.coding, sort_keys=True)
        clients = [cohort.adverts[i].client for i in survivors]
        return _messages.digest("sum", f"{announced.base} {coding} {clients}".encode()).hex()


@dataclass(frozen=True)
class _Cohort:
    """Who takes part, as one client sees it."""

    announced: Announcement
    adverts: list[Advert]
    index: int  #: this client's place among the adverts
    near: list[int]  #: its neighbours and itself, sorted
    context: bytes  #: digest of announcement and adverts, which all keys and signatures depend on

    @classmethod
    def of(cls, session: _Session, announced: Announcement, client: int) -> _Cohort:
        try:
            adverts = _messages.parse_adverts(session.adverts)
        except DecodeError as error:
            raise RefusedError(str(error)) from None
        own = [i for i, advert in enumerate(adverts) if advert.client == client]
        if not own or adverts[own[0]].mask_key != _public(session.mask_secret):
            raise RefusedError("this client's own keys are not among those advertised")
        context = context_of(session.announcement, session.adverts)
        near = neighbourhoods(len(adverts), announced.neighbours, graph_seed(context))[own[0]]
        return cls(announced, adverts, own[0], near, context)

    @property
    def others(self) -> list[int]:
        """Its neighbours."""
        return [i for i in self.near if i != self.index]


def context_of(announcement: bytes, adverts: bytes) -> bytes:
    """Return the digest of what a round is and who takes part, on which all its keys depend.

    Clients that were told different things derive different keys: their masks do not cancel.
    """
    known = _messages.digest("announcement", announcement)
    return _messages.digest("cohort", known, adverts)


def graph_seed(context: bytes) -> int:
    """Return the seed of the graph: nobody chooses it alone, as it depends on all adverts."""
    return int.from_bytes(context[:8], "big")


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def _nonce(dealer: int) -> bytes:
    """A pair's key serves two messages: one from either end."""
    return dealer.to_bytes(12, "big")


def _name(announced: Announcement) -> str:
    return f"{announced.run}/{announced.round}"


def _frozen(session: _Session) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for field in dataclasses.fields(session):
        value = getattr(session, field.name)
        if isinstance(value, bytes):
            value = value.hex()
        elif isinstance(value, dict):
            value = {str(i): share.hex() for i, share in value.items()}
        result[field.name] = value
    return result


def _thawed(kept: dict[str, Any] | None) -> _Session | None:
    if kept is None:
        return None
    values: dict[str, Any] = {}
    for key, value in kept.items():
        if isinstance(value, str):
            value = bytes.fromhex(value)
        elif isinstance(value, dict):
            value = {int(i): bytes.fromhex(share) for i, share in value.items()}
        values[key] = value
    return _Session(**values)
