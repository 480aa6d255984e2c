"""What devices reach of the server, and when they are answered."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from fedq.fleet.gateway import COMPLETE, MAX_BODY_BYTES, PULL, PUSH, SEEN, Gateway, report_of

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


def gateway(app: SuperLink) -> Gateway:
    names = {b"pem of pi-1": "pi-1"}
    return Gateway(app, CONTROL, names.get, KEY_HEADER, list, lambda body: body[0], lambda: 1000.0)


async def request(
    served: Gateway,
    path: str,
    body: bytes = b"\x07",
    *,
    port: int = DEVICES,
    headers: Mapping[str, bytes] = {},
    gone: asyncio.Event | None = None,
) -> tuple[int, bytes]:
    sent: list[Any] = []
    bodies = [body[at : at + 65536] for at in range(0, len(body), 65536)] or [b""]

    async def receive() -> Any:
        if bodies:
            piece = bodies.pop(0)
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
    return sent[0]["status"], sent[1]["body"]


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
        "/v1/fleet",
        "//v1/fleet/pull-messages",
    ],
)
def test_devices_reach_the_fleet_api_alone(path: str) -> None:
    async def test() -> None:
        app = SuperLink()
        assert (await request(gateway(app), path))[0] == 404
        assert app.asked == []
        if path != SEEN:
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


def test_a_body_larger_than_any_message_is_refused_unread() -> None:
    async def test() -> None:
        app = SuperLink()
        assert (await request(gateway(app), PULL, bytes(MAX_BODY_BYTES + 1)))[0] == 413
        assert app.asked == []

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
        *(b"", b"[]", b"nothing", b"[" * 500, b'{"load": NaN}', b'{"load": "%s"}' % (b"x" * 600)),
        *(b'{"fedq": "\\u001b[31m"}', b'{"memory_mb": [1]}', b'{"else": 1}'),
    ],
)
def test_a_report_is_a_few_plain_values(header: bytes) -> None:
    assert report_of(header) == {}
