"""A device's link to its server: Flower's Fleet API, and what to do when it fails.

Flower's own node gives up for good on some failures and lives on, dead; this one says in one line
what is wrong and tries again, for ever.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

import httpx

from fedq.errors import FedqError
from fedq.fleet import flower, health, identity
from fedq.fleet.files import Device
from fedq.fleet.gateway import PIECE_BYTES, PROBE, RELEASE, REPORT, WAIT, WANTED
from fedq.fleet.profile import LEAST_SENT_BYTES

LOG = logging.getLogger("fedq")
T = TypeVar("T")
CONNECT_S = 15.0
#: What a device sends at its start, to know its uplink before the first update.
PROBE_BYTES = LEAST_SENT_BYTES
FIRST_DELAY_S, LAST_DELAY_S = 1.0, 60.0
#: What the server accepts of a clock; see Flower's node authentication.
AHEAD_S, BEHIND_S = 5.0, 300.0
#: Heartbeats of a device without work: nobody waits for it.
IDLE_HEARTBEAT_S = 90.0


class RunOverError(FedqError):
    """The run that a message belongs to is over."""


class RefusedError(FedqError):
    """The server does not accept this device; somebody must do something about it."""


class Retrying:
    """Calls until it succeeds, saying each new reason once.

    Args:
      explain: Returns the error to say for a failure; raises what is not to be tried again.
      stopped: Ends the waiting.
      max_tries: None tries for ever.
    """

    def __init__(
        self,
        explain: Callable[[Exception], Exception],
        stopped: Event | None = None,
        max_tries: int | None = None,
    ) -> None:
        self._explain, self._stopped = explain, stopped or Event()
        self.max_tries = max_tries
        self._said = ""

    def invoke(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Return what a call returns in the end."""
        delay_s, tries = FIRST_DELAY_S, 0
        while True:
            try:
                result = call(*arguments, **options)
            except (httpx.HTTPError, OSError) as error:
                tries += 1
                why = self._explain(error)
                if self.max_tries is not None and tries >= self.max_tries:
                    raise why from None
                self._say(f"{why}; trying again")
            else:
                if self._said:
                    self._say("connected again")
                    self._said = ""
                return result
            if self._stopped.wait(delay_s * random.uniform(0.8, 1.2)):
                raise StoppedError
            delay_s = min(2 * delay_s, LAST_DELAY_S)

    def _say(self, text: str) -> None:
        if text != self._said:
            LOG.warning(text)
            self._said = text


class StoppedError(FedqError):
    """The process was asked to end while it waited."""


@dataclass
class _Headers:
    """Adds what the gateway wants to know."""

    wait_s: float
    own: dict[str, Any]
    told: dict[str, str]

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:
        if context.rpc_method.endswith("/PullMessages"):
            context.request.headers[WAIT.decode()] = f"{self.wait_s:g}"
        elif context.rpc_method.endswith(("/SendNodeHeartbeat", "/ActivateNode")):
            context.request.headers[REPORT.decode()] = json.dumps(
                health.report() | self.own, separators=(",", ":")
            )
        response: httpx.Response = call_next(context)
        if context.rpc_method.endswith("/PullMessages") and response.is_success:
            self.told["release"] = response.headers.get(WANTED.decode(), "")
        return response


class Link(flower.FleetHttpClient):
    """Requests to the Fleet API of one server, on connections that stay.

    Args:
      device: Whose server, key and options.
      stopped: Ends waiting for the server.
      max_tries: Attempts per request; None tries for ever.
    """

    def __init__(
        self, device: Device, stopped: Event | None = None, max_tries: int | None = None
    ) -> None:
        key = identity.load_openssh(device.key)
        #: What the device reports of itself, beside what every machine can say.
        self.report: dict[str, Any] = {}
        self._told: dict[str, str] = {}
        self._signer = flower.NodeAuthHttpInterceptor(key, key.public_key())
        try:
            context = ssl.create_default_context(cafile=str(device.ca))
        except OSError as error:
            raise FedqError(
                f"cannot read {device.ca}: {error}; join again with fedq fleet join"
            ) from None
        super().__init__(
            f"https://{device.server}",
            interceptors=[
                self._signer,
                _Headers(device.wait_s, self.report, self._told),
            ],
        )
        self._client.close()
        self._client = httpx.Client(
            verify=context,
            trust_env=False,
            timeout=httpx.Timeout(
                device.timeout_s, connect=CONNECT_S, read=device.wait_s + device.timeout_s
            ),
            limits=httpx.Limits(keepalive_expiry=device.wait_s + 2 * IDLE_HEARTBEAT_S),
        )
        # Each object of a message is a request: defaults that change nothing are a fifth of it.
        for name in ("accept", "accept-encoding", "connection", "user-agent"):
            del self._client.headers[name]
        self.server, self.public_key = device.server, flower.public_key_to_bytes(key.public_key())
        self.retrying = Retrying(self.explain, stopped, max_tries)
        self.invoke = self.retrying.invoke

    @property
    def release(self) -> str:
        """The release that this device should run, as the server said last; empty for none."""
        return self._told.get("release", "")

    def fetch(self, digest: str, name: str, offset: int) -> bytes:
        """Return part of a file of a release; empty at its end, and where there is none."""
        response = self._signed("GET", f"{RELEASE}{digest}/{name}/{offset}")
        try:
            if response.status_code == httpx.codes.NOT_FOUND:
                return b""
            response.raise_for_status()
            data = bytearray()
            for part in response.iter_raw():
                data += part
                if len(data) > PIECE_BYTES:
                    raise FedqError("the server sends more of a release than it was asked for")
            return bytes(data)
        finally:
            response.close()

    def measure(self) -> tuple[int, float]:
        """Send bytes that nobody keeps; return how many, and the seconds that took.

        Raises:
          httpx.HTTPError: If the server does not take them.
        """
        for size_bytes in (0, PROBE_BYTES):  # the first one opens the connection
            start = time.monotonic()
            response = self._signed("POST", PROBE, os.urandom(size_bytes))
            response.close()
            response.raise_for_status()
        return PROBE_BYTES, time.monotonic() - start

    def _signed(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        """Return the response, yet to be read, to a request that is signed as Flower's are."""
        request = self._client.build_request(
            method, f"https://{self.server}{path}", content=content
        )
        about = flower.ProtobufRequestContext("fedq", flower.Node(), request)
        return self._signer.intercept(
            about, lambda context: self._client.send(context.request, stream=True)
        )

    def explain(self, error: Exception) -> Exception:
        """Return what to say about a failed request.

        Raises:
          RunOverError: If the run is over; there is nothing to try again.
        """
        if isinstance(error, httpx.HTTPStatusError):
            response = error.response
            if response.status_code == httpx.codes.FORBIDDEN:
                raise RunOverError("the run is over")
            if response.status_code == httpx.codes.UNAUTHORIZED:
                return RefusedError(clock_error(response) or self._unknown())
            found = flower.FlowerError.from_json(response.text)
            if found is not None and "activate" in found.message.lower():
                return RefusedError(self._unknown())
            words = found.message if found is not None else f"HTTP status {response.status_code}"
            return FedqError(f"the server at {self.server} answers: {words}")
        text = str(error)
        if "certificate verify failed" in text:
            reason = text.rpartition("certificate verify failed: ")[2].partition(" (_ssl")[0]
            return RefusedError(f"{certificate_error(reason)} ({self.server}: {reason})")
        words = text or type(error).__name__
        return FedqError(f"the server at {self.server} cannot be reached ({words}); is it up?")

    def _unknown(self) -> str:
        return (
            f"the server at {self.server} does not accept this device's key: it was removed or "
            "rotated, or the device runs twice; on the server, see fedq fleet status"
        )


def clock_error(response: httpx.Response) -> str | None:
    """Return what is wrong with this machine's clock, by the server's; None if nothing is."""
    date = response.headers.get("date")
    try:
        server_s = email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None
    ahead_s = time.time() - server_s
    if -BEHIND_S < ahead_s < AHEAD_S:
        return None
    side = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"the clock of this device is {abs(ahead_s):.0f} s {side} the server's; "
        "set it: sudo timedatectl set-ntp true"
    )


def certificate_error(reason: str) -> str:
    """Return what to do about a server's certificate that does not verify.

    >>> certificate_error("certificate has expired")
    "the server's certificate has expired; on the server, run fedq fleet rotate server"
    """
    if "expired" in reason:
        return "the server's certificate has expired; on the server, run fedq fleet rotate server"
    if "not yet valid" in reason:
        return "the server's certificate is not valid yet; set the clock of this device"
    if "match" in reason:
        return "the server's certificate is for another name; on the server, run fedq fleet doctor"
    return "the server's certificate is not from this device's fleet; join again"
