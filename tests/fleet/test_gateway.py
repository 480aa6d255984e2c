"""What devices reach of the server, and when they are answered."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from fedq.fleet import gateway as module
from fedq.fleet.gateway import (
    COMPLETE,
    CONFIRM,
    MAX_BODY_BYTES,
    MAX_OBJECT_BYTES,
    MAX_STRANGERS_BYTES,
    MOST_DELIVERIES,
    OBJECT,
    PROBE,
    PULL,
    PUSH,
    RELEASE,
    RELEASED,
    SEEN,
    Gateway,
    Releases,
    report_of,
)

CONTROL, DEVICES = 9444, 9443
KEY_HEADER, KEY = "flwr-public-key", base64.b64encode(b"pem of pi-1")


class SuperLink:
    """Flower's side: gives each message once."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.asked: list[tuple[str, bytes]] = []
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.asked.append((scope["path"], message["body"]))
        body = b""
        if scope["path"] == PULL and self.messages:
            body = self.messages.pop()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": body})


WANTED = {"pi-1": "d" * 64}


def gateway(app: SuperLink) -> Gateway:
    names = {b"pem of pi-1": "pi-1"}
    releases = Releases(
        lambda headers: base64.b64decode(headers[KEY_HEADER]) if "signed" in headers else None,
        lambda name: WANTED.get(name, ""),
        lambda digest, file, offset, size: b"content"[offset:] if file == "model" else None,
    )
    return Gateway(
        app, CONTROL, names.get, KEY_HEADER, list, lambda body: body[0], releases, lambda: 1000.0
    )


async def request(
    served: Gateway,
    path: str,
    body: bytes = b"\x07",
    *,
    port: int = DEVICES,
    headers: Mapping[str, bytes] = {},
    gone: asyncio.Event | None = None,
    read: list[int] | None = None,
) -> tuple[int, bytes]:
    status, content, _ = await exchange(
        served, path, body, port=port, headers=headers, gone=gone, read=read
    )
    return status, content


async def exchange(
    served: Gateway,
    path: str,
    body: bytes = b"\x07",
    *,
    port: int = DEVICES,
    headers: Mapping[str, bytes] = {},
    gone: asyncio.Event | None = None,
    read: list[int] | None = None,
) -> tuple[int, bytes, dict[bytes, bytes]]:
    sent: list[Any] = []
    bodies = [body[at : at + 65536] for at in range(0, len(body), 65536)] or [b""]

    async def receive() -> Any:
        if bodies:
            piece = bodies.pop(0)
            if read is not None:
                read.append(len(piece))
            return {"type": "http.request", "body": piece, "more_body": bool(bodies)}
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "path": path,
        "raw_path": path.encode(),
        "server": ("127.0.0.1", port),
        "headers": [(name.encode(), value) for name, value in headers.items()],
    }
    await asyncio.wait_for(served(scope, receive, send), 10)
    return sent[0]["status"], sent[1]["body"], dict(sent[0].get("headers", ()))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/docs",
        "/",
        SEEN,
        RELEASED,
        "/v1/fleet",
        "//v1/fleet/pull-messages",
    ],
)
def test_devices_reach_the_fleet_api_alone(path: str) -> None:
    async def test() -> None:
        app = SuperLink()
        assert (await request(gateway(app), path))[0] == 404
        assert app.asked == []
        if path not in (SEEN, RELEASED):
            assert (await request(gateway(app), path, port=CONTROL))[0] == 200

    run(test)


def test_a_device_that_waits_is_told_of_its_work_and_asks_again() -> None:
    async def test() -> None:
        app = SuperLink()
        served = gateway(app)
        wait = {"x-fedq-wait": b"5"}
        waiting = asyncio.create_task(request(served, PULL, b"\x07", headers=wait))
        other = asyncio.create_task(request(served, PULL, b"\x08", headers={"x-fedq-wait": b"1"}))
        await asyncio.sleep(0.05)
        app.messages = [b"work"]
        await request(served, PUSH, b"\x07", port=CONTROL)
        await asyncio.sleep(0.3)
        assert not waiting.done()  # its pieces are not there yet
        await request(served, COMPLETE, b"piece", port=CONTROL)
        assert await waiting == (200, b"")
        assert app.messages == [b"work"]  # not given to a connection that may be dead
        assert not other.done()
        assert await request(served, PULL, b"\x07", headers=wait) == (200, b"work")
        assert await other == (200, b"")

    run(test)


def test_a_device_that_is_gone_is_not_waited_for() -> None:
    async def test() -> None:
        app, gone = SuperLink(), asyncio.Event()
        served = gateway(app)
        wait = {"x-fedq-wait": b"60"}
        waiting = asyncio.create_task(request(served, PULL, headers=wait, gone=gone))
        await asyncio.sleep(0.05)
        gone.set()
        await asyncio.wait_for(waiting, 5)

    run(test)


@pytest.mark.parametrize("wait", [None, b"0", b"-1", b"x", b"nan"])
def test_flowers_own_nodes_are_answered_at_once(wait: bytes | None) -> None:
    async def test() -> None:
        headers = {} if wait is None else {"x-fedq-wait": wait}
        answer = request(gateway(SuperLink()), PULL, headers=headers)
        assert await asyncio.wait_for(answer, 1) == (200, b"")

    run(test)


def test_a_refusal_does_not_wait() -> None:
    async def test() -> None:
        app = SuperLink()
        app.status = 401
        served = gateway(app)
        headers = {"x-fedq-wait": b"60", KEY_HEADER: KEY, "x-fedq-report": b'{"load": 1}'}
        assert (await request(served, PULL, headers=headers))[0] == 401
        seen = served.seen["pi-1"]
        assert (seen.refused, seen.requests, seen.last_s, seen.report) == (1, 0, 0.0, {})

    run(test)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("path", "key", "most"),
    [
        (OBJECT, KEY, MAX_OBJECT_BYTES),
        (PULL, KEY, MAX_BODY_BYTES),
        (OBJECT, b"", MAX_STRANGERS_BYTES),
        (PULL, base64.b64encode(b"stranger"), MAX_STRANGERS_BYTES),
    ],
)
def test_a_body_that_is_too_large_is_refused_before_it_is_read(
    path: str, key: bytes, most: int, declared: bool
) -> None:
    async def test() -> None:
        app, read = SuperLink(), list[int]()
        served = gateway(app)
        for size in (most, most + 1):
            headers = {KEY_HEADER: key}
            if declared:
                headers["content-length"] = str(size).encode()
            read.clear()
            status, _ = await request(served, path, bytes(size), headers=headers, read=read)
            assert status == (200 if size == most else 413)
        assert sum(read) <= (0 if declared else most + 65536)
        assert len(app.asked) == 1

    run(test)


@pytest.mark.parametrize("length", [b"-1", b"x", b"1" * 5000, b"\xb2"])
def test_a_length_that_is_none(length: bytes) -> None:
    async def test() -> None:
        headers = {"content-length": length}
        assert (await request(gateway(SuperLink()), PULL, headers=headers))[0] == 413

    run(test)


def test_bodies_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(module, "MAX_HELD_BYTES", 100_000)
        held, go_on = asyncio.Event(), asyncio.Event()

        class Slow(SuperLink):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                held.set()
                await go_on.wait()
                await super().__call__(scope, receive, send)

        served = gateway(Slow())
        headers = {KEY_HEADER: KEY}
        first = asyncio.create_task(request(served, OBJECT, bytes(70_000), headers=headers))
        await held.wait()
        assert (await request(served, OBJECT, bytes(70_000), headers=headers))[0] == 503
        go_on.set()
        assert (await first)[0] == 200
        assert (await request(served, OBJECT, bytes(70_000), headers=headers))[0] == 200

    run(test)


def test_work_is_given_again_until_it_is_confirmed() -> None:
    async def test() -> None:
        app = SuperLink()
        served, wait = gateway(app), {"x-fedq-wait": b"0.01"}
        app.messages = [b"work"]
        assert (await request(served, PULL, headers=wait))[1] == b"work"
        assert (await request(served, PULL, b"\x08", headers=wait))[1] == b""  # another node
        assert (await request(served, PULL))[1] == b""  # Flower's own, which may be at it
        assert (await request(served, PULL, headers=wait))[1] == b"work"
        await request(served, CONFIRM)
        assert (await request(served, PULL, headers=wait))[1] == b""
        app.messages = [b"more"]
        for _ in range(MOST_DELIVERIES):
            assert (await request(served, PULL, headers=wait))[1] == b"more"
        assert (await request(served, PULL, headers=wait))[1] == b""

    run(test)


def test_who_is_not_let_in_confirms_nothing() -> None:
    async def test() -> None:
        app = SuperLink()
        served, wait = gateway(app), {"x-fedq-wait": b"0.01"}
        app.messages = [b"work"]
        await request(served, PULL, headers=wait)
        app.status = 401
        await request(served, CONFIRM)
        app.status = 200
        assert (await request(served, PULL, headers=wait))[1] == b"work"

    run(test)


def test_a_device_is_told_of_its_release_and_fetches_it() -> None:
    async def test() -> None:
        served = gateway(SuperLink())
        headers = {KEY_HEADER: KEY, "x-fedq-wait": b"0.01"}
        told = (await exchange(served, PULL, headers=headers))[2]
        assert told[b"x-fedq-release"] == WANTED["pi-1"].encode()
        assert (
            b"x-fedq-release"
            not in (await exchange(served, PULL, headers={"x-fedq-wait": b"0.01"}))[2]
        )
        signed = {KEY_HEADER: KEY, "signed": b"1"}
        place = f"{RELEASE}{WANTED['pi-1']}"
        assert await request(served, f"{place}/model/3", headers=signed) == (200, b"tent")
        for path in ("/model/-1", "/model/x", "/model", "/other/0", "/model/1/2", ""):
            assert (await request(served, place + path, headers=signed))[0] == 404
        other = f"{RELEASE}{'e' * 64}/model/0"
        assert (await request(served, other, headers=signed))[0] == 404
        stranger = {**signed, KEY_HEADER: base64.b64encode(b"stranger")}
        for unknown in ({KEY_HEADER: KEY}, stranger):
            assert (await request(served, f"{place}/model/0", headers=unknown))[0] == 401

    run(test)


def test_a_device_may_see_how_fast_it_sends() -> None:
    async def test() -> None:
        app = SuperLink()
        served = gateway(app)
        own = {KEY_HEADER: KEY, "signed": b"yes"}
        assert await request(served, PROBE, bytes(MAX_STRANGERS_BYTES), headers=own) == (200, b"")
        too_much = bytes(MAX_STRANGERS_BYTES + 1)
        assert (await request(served, PROBE, too_much, headers=own))[0] == 413
        for headers in ({}, {KEY_HEADER: own[KEY_HEADER]}):
            read: list[int] = []
            assert (await request(served, PROBE, bytes(9), headers=headers, read=read))[0] == 401
            assert read == []
        assert app.asked == []

    run(test)


def test_a_device_that_waits_is_told_of_a_new_release(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        served = gateway(SuperLink())
        headers = {KEY_HEADER: KEY, "x-fedq-wait": b"60"}
        waiting = asyncio.create_task(exchange(served, PULL, headers=headers))
        await asyncio.sleep(0.05)
        await request(served, RELEASED, port=CONTROL)
        await asyncio.sleep(0.05)
        assert not waiting.done()  # not for this device
        monkeypatch.setitem(WANTED, "pi-1", "f" * 64)
        await request(served, RELEASED, port=CONTROL)
        assert (await waiting)[2][b"x-fedq-release"] == b"f" * 64

    run(test)


def test_what_is_seen_of_a_device() -> None:
    async def test() -> None:
        app = SuperLink()
        served = gateway(app)
        report = {"fedq": "0.1.0", "clock_s": 1003.25, "load": 0.5}
        headers = {KEY_HEADER: KEY, "x-fedq-report": json.dumps(report).encode()}
        app.messages = [b"x" * 100]
        await request(served, PULL, b"\x07" * 50, headers=headers)
        await request(served, PULL, headers={KEY_HEADER: base64.b64encode(b"stranger")})
        await request(served, PULL, headers={KEY_HEADER: b"!"})
        status, body = await request(served, SEEN, port=CONTROL)
        assert status == 200
        assert list(json.loads(body)) == ["pi-1"]
        seen = json.loads(body)["pi-1"]
        assert seen["last_s"] == 1000.0
        assert seen["up_bytes"] > 50 + len(KEY)
        assert seen["down_bytes"] > 100
        assert seen["report"] == {"fedq": "0.1.0", "load": 0.5, "ahead_s": 3.2}

    run(test)


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"[]", b"nothing", b"[" * 500, b'{"load": NaN}', b'{"load": "%s"}' % (b"x" * 1100)),
        *(b'{"fedq": "\\u001b[31m"}', b'{"memory_mb": [1]}', b'{"else": 1}'),
    ],
)
def test_a_report_is_a_few_plain_values(header: bytes) -> None:
    assert report_of(header) == {}
