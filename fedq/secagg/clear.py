"""The same integers without masks: what a masked sum must equal to the bit."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedq.errors import DecodeError
from fedq.keys import Roster
from fedq.registry import register
from fedq.secagg import _messages, _words
from fedq.secagg._grid import Integers
from fedq.secagg._messages import Announcement
from fedq.secagg.base import Collector, OnGrid


@register("secure_aggregation", "clear")
class Clear(OnGrid):
    """Integers of the common grid, which the server sees: to compare with; it protects nothing."""

    phases: ClassVar[tuple[str, ...]] = ("clear",)

    def numbers(self, clients: int) -> dict[str, int]:
        """Return zeros: nothing is shared."""
        return {"neighbours": 0, "threshold": 0}

    def collector(
        self,
        announcement: Announcement,
        identity: Ed25519PrivateKey,
        roster: Roster,
        whos: Iterable[Hashable],
    ) -> Collector:
        """Return a plain sum."""
        return Tally(announcement, identity, whos)


class Tally:
    """Sums what clients send in the clear."""

    def __init__(
        self,
        announcement: Announcement,
        identity: Ed25519PrivateKey,
        whos: Iterable[Hashable],
    ) -> None:
        self.announcement = announcement
        self._message = announcement.sealed(identity)
        self._segments = announcement.segments
        self._sum = _words.zeros(self._segments)
        self._whos = list(whos)
        self.survivors: list[Hashable] = []

    def messages(self, phase: str) -> dict[Hashable, bytes]:
        """Return the announcement for everybody."""
        return dict.fromkeys(self._whos, self._message)

    def receive(self, phase: str, who: Hashable, answer: bytes | memoryview) -> None:
        """Add one client's integers."""
        content = _messages.after_session(answer, self.announcement.session_bytes)
        if who not in self._whos or who in self.survivors:
            raise DecodeError("integers were not asked for, or sent before")
        words = _words.unpack(content, self._segments)
        for total, array in zip(self._sum, words, strict=True):
            total += array
        self.survivors.append(who)

    def proven(self, who: Hashable) -> int | None:
        """Return None: nobody proves anything."""
        return None

    def sums(self) -> list[Integers]:
        """Return the sums."""
        return _words.centred(self._sum, self._segments)


def answer(announced: Announcement, integers: Sequence[Integers]) -> bytes:
    """Return a client's integers, packed."""
    segments = announced.segments
    return announced.session_bytes + _words.pack(_words.wrap(integers, segments), segments)
