"""Between devices and Flower's SuperLink, which serves devices and administrators on one port.

One application, two sockets: devices reach the Fleet API and nothing else; whoever starts runs or
registers devices must be on the server itself. Pure ASGI, and the rest of what a fleet wants of
its server:

- **Work is announced.** A device asks for work with ``X-Fedq-Wait: SECONDS``, and where there is
  none the answer, empty, waits until there is some. Then the device asks again. Work itself is
  never given to a request that has waited: its connection may be dead.
  (Flower's own nodes ask every three seconds, and need no answer in time.)
- **Work is given until it is confirmed.** Flower delivers once. A device that asks again without
  having confirmed its message has lost it, to a cut or to a kill, and is given it again.
- **Bodies are bounded before they are read**: by what a request of its kind may have, and all
  together.
- **Models are fetched.** A device is told with each answer which release it should run; that one it
  may fetch.
- **What is seen.** When each device was last heard, bytes of its requests and replies (bodies and
  headers, without TLS), and the few numbers that it reports of itself.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    MutableMapping,
)
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET_API = "/v1/fleet/"
PULL, CONFIRM = "/v1/fleet/pull-messages", "/v1/fleet/confirm-message-received"
#: The one request of a device that is large.
OBJECT = "/v1/fleet/push-object"
#: Where a device gets the files of a release: digest, name and offset follow.
RELEASE = "/v1/fedq/release/"
PIECE_BYTES = 1 << 18
#: Where a device sends bytes to see how long that takes.
PROBE = "/v1/fedq/probe"
#: Where the administrator's side asks what the gateway has seen, and says that there are releases.
SEEN, RELEASED = "/v1/fedq/devices", "/v1/fedq/released"
#: A run's requests that name devices with work, and that complete what the work consists of.
PUSH, COMPLETE = "/v1/runtime/push-messages", "/v1/runtime/push-object"
WAIT, REPORT, WANTED = b"x-fedq-wait", b"x-fedq-report", b"x-fedq-release"
MAX_WAIT_S = 300.0
#: The pieces of a message come one after the other.
GATHER_S = 0.1
#: Larger than any object of a device: Flower sends arrays in pieces of at most 5 MiB.
MAX_OBJECT_BYTES = 8 << 20
#: Larger than any other request: names of the pieces of the largest update.
MAX_BODY_BYTES = 1 << 20
#: From somebody with no key of this fleet.
MAX_STRANGERS_BYTES = 1 << 16
#: Bodies held at any time; a device that finds no room tries again.
MAX_HELD_BYTES = 256 << 20
#: A message that a device loses so often is not given to it again.
MOST_DELIVERIES = 3
MAX_REPORT_BYTES = 1024
#: Beyond any figure; the time in seconds is 2e9.
MOST_FIGURE = 1e15
#: What a device may say of itself, in numbers and in words; all else is dropped.
FIGURES = frozenset(
    {
        *("clock_s", "load", "temperature_c", "throttled", "memory_mb", "free_mb", "ram_mb"),
        *("cores", "weight_bits", "images_s", "up_bytes_s", "round"),
        "partition_id",
    }
)
WORDS = frozenset({"fedq", "flwr", "artefact", "artefact_state"})


@dataclass(frozen=True)
class Releases:
    """Which release each device should run, and its files.

    Args:
      signer: Returns the public key of who signed a request's headers, None if nobody did.
      wanted: Returns a device's digest; empty if it should run nothing.
      piece: Returns part of a file, by digest, name, offset and size; None if there is none.
    """

    signer: Callable[[Mapping[str, str]], bytes | None] = lambda headers: None
    wanted: Callable[[str], str] = lambda name: ""
    piece: Callable[[str, str, int, int], bytes | None] = lambda *where: None


@dataclass
class Seen:
    """What the gateway knows of a device."""

    last_s: float = 0.0
    requests: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    refused: int = 0
    report: dict[str, Any] = field(default_factory=dict)


class Gateway:
    """An ASGI application around Flower's.

    Args:
      app: The SuperLink.
      control_port: Port of the socket on which everything is allowed.
      name: Returns the name of the device with a public key (PEM), None for a stranger.
      key_header: Header in which a device's public key comes, base64.
      destinations: Returns the node ids that the body of a run's push names.
      node: Returns the node id in the body of a device's question for work.
      releases: Where they come from.
      clock: Seconds since 1970.
    """

    def __init__(
        self,
        app: App,
        control_port: int,
        name: Callable[[bytes], str | None],
        key_header: str,
        destinations: Callable[[bytes], Iterable[int]],
        node: Callable[[bytes], int],
        releases: Releases | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._app, self._control_port, self._name = app, control_port, name
        self._key_header, self._clock = key_header.lower().encode(), clock
        self._destinations, self._node = destinations, node
        self._releases = releases or Releases()
        self._due: set[int] = set()  # nodes with work that they have not been given
        self._given: dict[int, _Given] = {}  # by node, what it has not confirmed
        self._held_bytes = 0
        self._work = asyncio.Event()  # set, and replaced, when there is more
        self.seen: dict[str, Seen] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # nobody speaks anything else here
        path = scope["path"]
        if scope["server"][1] == self._control_port:
            if path == SEEN:
                known = {name: asdict(seen) for name, seen in sorted(self.seen.items())}
                await _answer(send, 200, json.dumps(known).encode())
                return
            if path == RELEASED:
                self._tell()
                await _answer(send, 200, b"{}")
                return
            await self._serve_administrator(scope, receive, send)
        elif path == PROBE:
            await self._serve_probe(scope, receive, send)
        elif path.startswith(RELEASE):
            await self._serve_release(scope, send)
        elif not path.startswith(FLEET_API):
            await _answer(send, 404, b'{"detail": "devices reach the Fleet API only"}')
        else:
            await self._serve_device(scope, receive, send)

    async def _serve_administrator(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, body = scope["path"], bytearray()

        async def watched() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        await self._app(scope, watched if path == PUSH else receive, send)
        if path == PUSH:
            self._due.update(self._destinations(bytes(body)))
        elif path == COMPLETE:
            self._tell()

    def _tell(self) -> None:
        """Have those who wait look whether there is something for them."""
        self._work.set()
        self._work = asyncio.Event()

    def _signer(self, scope: Scope) -> str | None:
        """Return the device that signed a request, None if none of this fleet did."""
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        key = self._releases.signer(headers)
        return None if key is None else self._name(key)

    async def _serve_probe(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._signer(scope) is None:
            await _answer(send, 401, b'{"detail": "not a device of this fleet"}')
            return
        try:
            async with self._body(scope["path"], dict(scope["headers"]), True, receive):
                pass
        except _RefusedError as error:
            await _answer(send, error.status, json.dumps({"detail": str(error)}).encode())
            return
        await _answer(send, 200, b"")

    async def _serve_release(self, scope: Scope, send: Send) -> None:
        name = self._signer(scope)
        digest, _, rest = scope["path"].removeprefix(RELEASE).partition("/")
        file, _, offset = rest.partition("/")
        if name is None:
            await _answer(send, 401, b'{"detail": "not a device of this fleet"}')
            return
        data = None
        if digest == self._releases.wanted(name) and re.fullmatch(r"\d{1,12}", offset, re.ASCII):
            data = self._releases.piece(digest, file, int(offset), PIECE_BYTES)
        if data is None:
            await _answer(send, 404, b'{"detail": "not released for this device"}')
        else:
            await _answer(send, 200, data)

    async def _serve_device(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, work = dict(scope["headers"]), self._work
        name = self._known(headers)
        try:
            async with self._body(scope["path"], headers, name is not None, receive) as body:
                response = await self._ask(scope, body)
        except _RefusedError as error:
            await _answer(send, error.status, json.dumps({"detail": str(error)}).encode())
            return
        if response.status in (200, 403) and scope["path"] in (PULL, CONFIRM):
            node = self._node(body)
            if scope["path"] == CONFIRM:
                self._given.pop(node, None)
            elif response.status == 200 and (wait_s := _seconds(headers.get(WAIT))):
                response = self._deliver(node, response)
                if not response.size:
                    await self._wait(node, name, receive, work, time.monotonic() + wait_s)
                response.add(WANTED, self._releases.wanted(name or "").encode())
        self._note(name, headers, scope, body, response)
        for message in response.messages:
            await send(message)

    def _deliver(self, node: int, response: _Response) -> _Response:
        """Return the message that a node is given: a new one, or what it has not confirmed."""
        if response.size:
            self._due.discard(node)
            self._given[node] = _Given(response)
        elif node in self._given:
            given = self._given[node]
            given.times += 1
            if given.times >= MOST_DELIVERIES:
                del self._given[node]
            return given.response
        return response

    @asynccontextmanager
    async def _body(
        self, path: str, headers: Mapping[bytes, bytes], known: bool, receive: Receive
    ) -> AsyncIterator[bytes]:
        """Read a request's body and count it as held until the end of the context.

        Raises:
          _RefusedError: If it is too large, before more of it is read.
        """
        most = MAX_STRANGERS_BYTES if not known else _MOST.get(path, MAX_BODY_BYTES)
        declared = headers.get(b"content-length", b"0")
        if len(declared) > 20 or not declared.isdigit() or int(declared) > most:
            raise _RefusedError(413, f"at most {most} bytes")
        body, more = bytearray(), True
        try:
            while more:
                message = await receive()
                piece = message.get("body", b"")
                if len(body) + len(piece) > most:
                    raise _RefusedError(413, f"at most {most} bytes")
                if self._held_bytes + len(piece) > MAX_HELD_BYTES:
                    raise _RefusedError(503, "too many requests at once")
                body += piece
                self._held_bytes += len(piece)
                more = message["type"] != "http.disconnect" and bool(message.get("more_body"))
            yield bytes(body)
        finally:
            self._held_bytes -= len(body)

    async def _wait(
        self, node: int, name: str | None, receive: Receive, work: asyncio.Event, end: float
    ) -> None:
        """Wait until a node has work or another release, time is up or the device has left."""
        wanted = self._releases.wanted(name or "")
        leaving = asyncio.ensure_future(receive())
        try:
            while (left_s := end - time.monotonic()) > 0 and not leaving.done():
                waiting = asyncio.ensure_future(work.wait())
                await asyncio.wait(
                    {waiting, leaving}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                )
                came = waiting.done()
                waiting.cancel()
                if came and node in self._due:
                    await asyncio.sleep(GATHER_S)
                    return
                if came and self._releases.wanted(name or "") != wanted:
                    return
                work = self._work
        finally:
            leaving.cancel()

    async def _ask(self, scope: Scope, body: bytes) -> _Response:
        response, sent = _Response(), False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                await asyncio.sleep(3600)  # cancelled when the application returns
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(message: Message) -> None:
            response.messages.append(message)

        await self._app(dict(scope, state=dict(scope.get("state", {}))), replay, keep)
        return response

    def _known(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Return the device whose public key a request carries; anybody can send one."""
        try:
            key = base64.b64decode(headers.get(self._key_header, b""), validate=True)
        except (binascii.Error, ValueError):
            return None
        return self._name(key)

    def _note(
        self,
        name: str | None,
        headers: Mapping[bytes, bytes],
        scope: Scope,
        body: bytes,
        response: _Response,
    ) -> None:
        if name is None:
            return
        seen = self.seen.setdefault(name, Seen())
        if response.status == 401:
            seen.refused += 1
            return
        seen.last_s = self._clock()
        seen.requests += 1
        seen.up_bytes += len(body) + len(scope["raw_path"]) + 17 + _size(scope["headers"])
        seen.down_bytes += response.size + 17 + _size(response.headers)
        if REPORT in headers:
            seen.report = report_of(headers[REPORT])
            if isinstance(clock_s := seen.report.pop("clock_s", None), int | float):
                seen.report["ahead_s"] = round(clock_s - seen.last_s, 1)


@dataclass
class _Response:
    """What the application said, kept until it is clear that it is the answer."""

    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"]) if self.messages else 500

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return list(self.messages[0].get("headers", ())) if self.messages else []

    def add(self, name: bytes, value: bytes) -> None:
        """Add a header, unless there is nothing to say."""
        if value:
            start = self.messages[0]
            self.messages[0] = {**start, "headers": [*start.get("headers", ()), (name, value)]}

    @property
    def size(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.messages)


@dataclass
class _Given:
    """A message under way to a node, and how often it was given."""

    response: _Response
    times: int = 1


class _RefusedError(Exception):
    """A request that is not read to its end."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


_MOST = {OBJECT: MAX_OBJECT_BYTES, PROBE: MAX_STRANGERS_BYTES}


def report_of(header: bytes) -> dict[str, Any]:
    """Return what a device says of itself: known keys with short plain values of their kind.

    >>> report_of(b'{"fedq": "0.1.0", "load": 0.5, "run": "me", "throttled": [1], "cores": 1e999}')
    {'fedq': '0.1.0', 'load': 0.5}
    """
    if len(header) > MAX_REPORT_BYTES:
        return {}
    try:
        data = json.loads(header, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {
        key: value
        for key, value in data.items()
        if (key in FIGURES and isinstance(value, int | float) and abs(value) < MOST_FIGURE)
        or (key in WORDS and isinstance(value, str) and value.isprintable())
    }


def _seconds(header: bytes | None) -> float:
    try:
        return min(max(float(header or 0), 0.0), MAX_WAIT_S)
    except ValueError:
        return 0.0


def _size(headers: Any) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers) + 2


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
