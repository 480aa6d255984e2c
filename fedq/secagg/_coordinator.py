"""The server's side of secure aggregation: it learns an exact sum, or that there is none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedq.errors import DecodeError, FedqError
from fedq.keys import Roster
from fedq.secagg import _messages, _shamir, _words
from fedq.secagg._graph import neighbourhoods
from fedq.secagg._grid import Integers
from fedq.secagg._messages import Advert, Announcement
from fedq.secagg._party import context_of, graph_seed


class AbortedError(FedqError):
    """The round has no sum: too few clients are left, or one of them broke it.

    Attributes:
      culprit: The client that no honest one would be, as the transport names it; None if it may be
        bad luck.
    """

    def __init__(self, reason: str, culprit: Hashable = None) -> None:
        super().__init__(reason)
        self.culprit = culprit


@dataclass
class _Member:
    """A client that advertised its keys, and what it did since."""

    who: Hashable
    advert: Advert
    near: list[int] = field(default_factory=list)
    commitments: bytes = b""
    sealed: dict[int, bytes] = field(default_factory=dict)
    masked: bool = False
    #: By neighbour: the tag for it, that this client goes on with the list of survivors.
    tags: dict[int, bytes] = field(default_factory=dict)
    #: By dealer: the share that this client gave at the end.
    shares: dict[int, bytes] = field(default_factory=dict)


class Coordinator:
    """One attempt at a round: for each phase, messages to clients and what they answer.

    ``who`` names a client to the transport. A client whose answer is not received, or not accepted,
    is left out of the phases that follow. Memory does not grow with masked vectors: they are summed
    as they come.

    Args:
      announcement: What the round is.
      identity: The server's signing key.
      roster: Which devices may take part.
      whos: Clients that are asked.

    Example:
      >>> from fedq.keys import simulated, SimulatedRoster
      >>> import numpy as np
      >>> from fedq.secagg import PHASES, Party
      >>> announcement = Announcement(
      ...     run="example", round=1, session="0" * 32, clients=3, neighbours=2, threshold=2,
      ...     parts=((2, 4), (2, 20)), coding={}, base="0" * 64)
      >>> roster = SimulatedRoster(0)
      >>> server = Coordinator(announcement, simulated(0).signing, roster, range(3))
      >>> clients = {i: Party(i, simulated(0, i).signing, roster) for i in range(3)}
      >>> vectors = {i: [np.array([i, -1]), np.array([0, 1])] for i in clients}
      >>> for phase in PHASES:
      ...     for i, message in server.messages(phase).items():
      ...         more = [vectors[i]] if phase == "mask" else []
      ...         server.receive(phase, i, getattr(clients[i], phase)(message, *more))
      >>> server.sums()
      [array([ 3, -3]), array([0, 3])]
    """

    def __init__(
        self,
        announcement: Announcement,
        identity: Ed25519PrivateKey,
        roster: Roster,
        whos: Iterable[Hashable],
    ) -> None:
        self.announcement, self.roster = announcement, roster
        self._whos = list(whos)
        self._segments = announcement.segments
        self._sum = _words.zeros(self._segments)
        self._announcement = announcement.sealed(identity)
        self._known = _messages.digest("announcement", self._announcement)
        self._adverts: dict[Hashable, Advert] = {}
        self._members: list[_Member] = []
        self._index: dict[Hashable, int] = {}
        self._context = b""
        self._dealers, self._survivors = b"", b""

    def messages(self, phase: str) -> dict[Hashable, bytes]:
        """Close the phase before, and return what this one asks of whom.

        Raises:
          AbortedError: If too few clients are left.
        """
        make: Callable[[], dict[Hashable, bytes]] = getattr(self, f"_ask_to_{phase}")
        return make()

    def receive(self, phase: str, who: Hashable, answer: bytes | memoryview) -> None:
        """Accept a client's answer.

        Raises:
          DecodeError: If it is not what an honest client answers; nothing has changed.
        """
        content = _messages.after_session(answer, self.announcement.session_bytes)
        if phase == "advertise":
            self._advertised(who, bytes(content))
            return
        if who not in self._index:
            raise DecodeError("a client answers that was not asked")
        take: Callable[[int, memoryview], None] = getattr(self, f"_take_{phase}")
        take(self._index[who], content)

    @property
    def survivors(self) -> list[Hashable]:
        """The clients whose masked vectors are in the sum."""
        return [member.who for member in self._members if member.masked]

    def proven(self, who: Hashable) -> int | None:
        """Return the number of the client whose keys ``who`` has, None before its advert."""
        return self._adverts[who].client if who in self._adverts else None

    # --- the five phases ---------------------------------------------------------------------

    def _ask_to_advertise(self) -> dict[Hashable, bytes]:
        return dict.fromkeys(self._whos, self._announcement)

    def _advertised(self, who: Hashable, content: bytes) -> None:
        if len(content) != Advert.SIZE or who not in self._whos or who in self._adverts:
            raise DecodeError("not an advert of keys")
        advert = Advert.parse(content)
        if not advert.genuine(self.roster, self._known):
            raise DecodeError(f"client {advert.client} is not on the roster, or did not sign this")
        if any(advert.client == other.client for other in self._adverts.values()):
            raise DecodeError(f"client {advert.client} takes part already")
        self._adverts[who] = advert

    def _ask_to_share(self) -> dict[Hashable, bytes]:
        ordered = sorted(self._adverts.items(), key=lambda item: item[1].client)
        self._members = [_Member(who, advert) for who, advert in ordered]
        self._index = {who: i for i, (who, _) in enumerate(ordered)}
        adverts = b"".join(advert.packed for _, advert in ordered)
        self._context = context_of(self._announcement, adverts)
        near = neighbourhoods(len(ordered), self.announcement.neighbours, graph_seed(self._context))
        for member, nearby in zip(self._members, near, strict=True):
            member.near = nearby
        self._check_enough(range(len(ordered)), "advertised their keys")
        message = self.announcement.session_bytes + adverts
        return {member.who: message for member in self._members}

    def _take_share(self, index: int, content: memoryview) -> None:
        member = self._members[index]
        committed = 2 * _messages.COMMITMENT_BYTES * len(member.near)
        size = _messages.SEALED_BYTES
        if len(content) != committed + size * (len(member.near) - 1) or member.commitments:
            raise DecodeError("shares are truncated, too many, or dealt twice")
        member.commitments = bytes(content[:committed])
        others = [i for i in member.near if i != index]
        for place, i in enumerate(others):
            at = committed + place * size
            member.sealed[i] = bytes(content[at : at + size])

    def _ask_to_mask(self) -> dict[Hashable, bytes]:
        dealers = [i for i, member in enumerate(self._members) if member.commitments]
        self._check_enough(dealers, "dealt shares of their keys")
        self._dealers = _messages.to_bitmap(dealers, len(self._members))
        message = self.announcement.session_bytes + self._dealers
        return {self._members[i].who: message for i in dealers}

    def _take_mask(self, index: int, content: memoryview) -> None:
        member = self._members[index]
        if member.masked or not member.commitments:
            raise DecodeError("masked integers were not asked for, or sent before")
        words = _words.unpack(content, self._segments)
        for total, array in zip(self._sum, words, strict=True):
            total += array
        member.masked = True

    def _ask_to_agree(self) -> dict[Hashable, bytes]:
        survivors = [i for i, member in enumerate(self._members) if member.masked]
        self._check_enough(survivors, "sent masked integers")
        self._survivors = _messages.to_bitmap(survivors, len(self._members))
        start = self.announcement.session_bytes + self._survivors
        messages = {}
        for i in survivors:
            dealt = (self._members[j].sealed.get(i) for j in self._members[i].near)
            messages[self._members[i].who] = start + b"".join(s for s in dealt if s is not None)
        return messages

    def _take_agree(self, index: int, content: memoryview) -> None:
        member, size = self._members[index], _messages.TAG_BYTES
        others = [i for i in member.near if i != index]
        if not member.masked or member.tags or len(content) != size * len(others):
            raise DecodeError("tags are truncated, too many, were not asked for, or sent before")
        for place, i in enumerate(others):
            member.tags[i] = bytes(content[size * place : size * (place + 1)])

    def _ask_to_unmask(self) -> dict[Hashable, bytes]:
        agreed = {i: member for i, member in enumerate(self._members) if member.tags}
        self._check_enough(agreed, "agreed on who is left")
        messages = {}
        for index, member in agreed.items():
            proofs = (
                i.to_bytes(2, "big") + agreed[i].tags[index]
                for i in member.near
                if i in agreed and i != index
            )
            messages[member.who] = self.announcement.session_bytes + b"".join(proofs)
        return messages

    def _take_unmask(self, index: int, content: memoryview) -> None:
        member = self._members[index]
        asked = [i for i in member.near if self._members[i].commitments]
        size = (len(asked) + 7) // 8
        here = _messages.from_bitmap(bytes(content[:size]), len(asked))
        if len(content) != size + _shamir.SHARE_BYTES * len(here) or not member.tags:
            raise DecodeError("shares are truncated, too many, or were not asked for")
        if member.shares:
            raise DecodeError("shares were given before")
        for place, which in enumerate(here):
            at = size + _shamir.SHARE_BYTES * place
            share = bytes(content[at : at + _shamir.SHARE_BYTES])
            dealer = self._members[asked[which]]
            # The dealer is bound to both shares of each holder: a wrong one is known, and passed
            # over.
            held = 2 * dealer.near.index(index) + (not dealer.masked)
            start = _messages.COMMITMENT_BYTES * held
            expected = dealer.commitments[start : start + _messages.COMMITMENT_BYTES]
            if _messages.commitment_to_share(share) == expected:
                member.shares[asked[which]] = share

    def sums(self) -> list[Integers]:
        """Close the last phase and return the sums of the survivors' integers, exactly.

        Raises:
          AbortedError: If a key cannot be put together. It names the client whose it is, as the
            culprit if the shares that it dealt are wrong.
        """
        plus: list[bytes] = []
        minus: list[bytes] = []
        bases: dict[tuple[int, ...], dict[int, int]] = {}
        for i, member in enumerate(self._members):
            if not member.commitments:
                continue
            secret = self._combined(i, bases)
            if member.masked:
                if _messages.digest("seed", secret) != member.advert.commitment:
                    raise self._dealt_wrongly(member)
                minus.append(_messages.own_key(secret, self._context, _words.KEY_BYTES))
                continue
            own = X25519PrivateKey.from_private_bytes(secret)
            if own.public_key().public_bytes_raw() != member.advert.mask_key:
                raise self._dealt_wrongly(member)
            for j in member.near:
                if j == i or not self._members[j].masked:
                    continue
                key = _messages.agreed_key(
                    own,
                    self._members[j].advert.mask_key,
                    self._context,
                    b"fedq secagg pair mask",
                    _words.KEY_BYTES,
                )
                # What j added for a client before it, it is now relieved of.
                (minus if i < j else plus).append(key)
        _words.add_keystreams(self._sum, plus, minus)
        return _words.centred(self._sum, self._segments)

    def _combined(self, dealer: int, bases: dict[tuple[int, ...], dict[int, int]]) -> bytes:
        member, threshold = self._members[dealer], self.announcement.threshold
        shares = {
            i + 1: self._members[i].shares[dealer]
            for i in member.near
            if dealer in self._members[i].shares
        }
        if len(shares) < threshold:
            # Holders who answered and have no good share of it: more than may lie, or lost ones.
            without = sum(bool(self._members[i].shares) for i in member.near) - len(shares)
            liars = len(member.near) - threshold
            raise AbortedError(
                f"{len(shares)} of {threshold} shares of client {member.advert.client}'s keys came "
                "back; the sum stays masked",
                culprit=member.who if without > liars else None,
            )
        holders = tuple(shares)[:threshold]
        if holders not in bases:
            bases[holders] = _shamir.basis(holders)
        return _shamir.combine({x: shares[x] for x in holders}, bases[holders])

    @staticmethod
    def _dealt_wrongly(member: _Member) -> AbortedError:
        return AbortedError(
            f"client {member.advert.client} dealt shares of something else than its keys; the sum "
            "stays masked",
            culprit=member.who,
        )

    def _check_enough(self, left: Collection[int], what: str) -> None:
        """Abort if nobody's keys could be put together any more."""
        needed = self.announcement.threshold
        if len(left) < needed:
            raise AbortedError(
                f"{len(left)} of {self.announcement.clients} clients {what}, {needed} are needed"
            )
