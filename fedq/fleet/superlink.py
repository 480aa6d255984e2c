"""The server process: Flower's SuperLink behind the gateway, on a socket for each side."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import uvicorn

from fedq.errors import FedqError
from fedq.fleet import control, flower, releases
from fedq.fleet.files import Fleet, end_process, locked
from fedq.fleet.gateway import Gateway, Releases

LOG = logging.getLogger("fedq")
START_S = 60.0
#: Longer than a device waits for work: a connection is not made anew for each request.
KEEP_ALIVE_S = 330


def serve(fleet: Fleet) -> None:
    """Serve a fleet until a signal ends it."""
    flower.require_known()
    os.umask(0o077)
    if (pid := fleet.pid()) is not None:
        raise FedqError(f"the fleet is up already (process {pid})")
    # Before the lock: who holds it is the one that answers.
    sockets = [_bind(fleet.listen, fleet.port), _bind("127.0.0.1", fleet.control_port)]
    with locked(fleet.path("superlink.lock"), "the fleet is up already"):
        app = flower.superlink_app(
            [
                *("--host", "127.0.0.1", "--port", str(fleet.control_port)),
                *("--ssl-ca-certfile", str(fleet.path("ca.crt"))),
                *("--ssl-certfile", str(fleet.path("server.crt"))),
                *("--ssl-keyfile", str(fleet.path("server.key"))),
                *("--database", str(fleet.path("superlink.db"))),
                *("--isolation", "process", "--enable-supernode-auth"),
                "--disable-runtime-dependency-installation",
            ]
        )
        names = _Names(fleet.root)
        gateway = Gateway(
            app,
            fleet.control_port,
            names,
            flower.FLEET_HTTP_PUBLIC_KEY_HEADER,
            flower.destinations,
            flower.asking_node,
            Releases(
                flower.signed_by, _Wanted(fleet), partial(releases.piece, fleet.path("releases"))
            ),
        )
        server = uvicorn.Server(
            uvicorn.Config(
                gateway,
                ws="none",
                access_log=False,
                log_level="warning",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=3,
                ssl_certfile=fleet.path("server.crt"),
                ssl_keyfile=str(fleet.path("server.key")),
                server_header=False,
            )
        )
        threading.Thread(target=_register, args=(server, fleet), daemon=True).start()
        server.run(sockets=sockets)


def start(fleet: Fleet) -> bool:
    """Start the server in the background; return False if it was up.

    Raises:
      FedqError: If it does not come up; with its own last words.
    """
    if fleet.pid() is not None:
        return False
    log = fleet.path("superlink.log")
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fedq.cli", "fleet", "up", "--foreground"),
                *("--fleet", str(fleet.root)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        _wait(fleet, process)
    except BaseException as error:
        process.kill()
        process.wait()
        words = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
        if isinstance(error, FedqError) and words:
            raise FedqError(words[-1].removeprefix("fedq: ")) from None
        raise
    process.returncode = 0  # it outlives this process: nothing to warn of
    return True


def _wait(fleet: Fleet, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise FedqError(f"the server ends with status {process.returncode}")
        if fleet.pid() == process.pid and is_healthy(fleet):
            return
        time.sleep(0.1)
    raise FedqError(f"the server does not come up within {START_S:.0f} s")


def stop(fleet: Fleet) -> bool:
    """Stop the server; return False if it was not up."""
    return end_process(fleet.path("superlink.lock"))


def is_healthy(fleet: Fleet) -> bool:
    """Return whether the server answers on its control port."""
    try:
        with control.connected(fleet) as client:
            control.nodes(client)
    except FedqError:
        return False
    return True


class _Names:
    """The fleet's devices by public key; follows ``fleet.json`` while the server runs."""

    def __init__(self, root: Path) -> None:
        self._root, self._read_at, self._names = root, 0.0, dict[bytes, str]()

    def __call__(self, key: bytes) -> str | None:
        if key not in self._names and time.monotonic() - self._read_at > 1.0:
            self._read_at = time.monotonic()
            with contextlib.suppress(FedqError):
                self._names = {pem: name for name, pem in Fleet.open(self._root).nodes().items()}
        return self._names.get(key)


class _Wanted:
    """Which release each device should run; follows ``wanted.json`` while the server runs."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._changed = fleet, 0
        self._wanted: dict[str, list[str]] = {}

    def __call__(self, name: str) -> str:
        with contextlib.suppress(OSError, FedqError):
            changed = (self._fleet.path("releases") / "wanted.json").stat().st_mtime_ns
            if changed != self._changed:
                self._wanted = releases.wanted(self._fleet)
                self._changed = changed
        return self._wanted.get(name, [""])[-1]


def _register(server: uvicorn.Server, fleet: Fleet) -> None:
    """Register what ``fleet.json`` names, once the server answers."""
    while not server.started:
        time.sleep(0.05)
    try:
        with control.connected(fleet) as client:
            control.sync(client, Fleet.open(fleet.root))
    except FedqError as error:
        LOG.error("cannot register the devices: %s", error)


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise FedqError(
                f"port {port} is taken; stop what uses it, or change it in fleet.json"
            ) from None
        raise FedqError(
            f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}"
        ) from None


def check_certificate(fleet: Fleet) -> None:
    """Raise :class:`FedqError` if the server's certificate and key do not work."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(fleet.path("server.crt"), fleet.path("server.key"))
    except (OSError, ssl.SSLError) as error:
        raise FedqError(
            f"the server's certificate: {error}; run fedq fleet rotate server"
        ) from None
