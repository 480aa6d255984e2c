"""A fleet's directory on the server, and a device's own directory.

::

    fleet.json            name, address, ports, devices
    ca.crt  ca.key        certificate authority; the key stays here
    server.crt server.key
    devices/pi-1.pub      the public key of each device
    bundles/pi-1.tar      what goes to the device; its private key in there is encrypted
    releases/             models for devices, and which device should run which
    superlink.db .log     Flower's state
    superlink.lock        held, with the process id in it, while the SuperLink runs
    run.json run.lock     the newest run

    device.json           name, server, options of one device
    ca.crt key            the fleet's authority; the device's private key
    state/                what a device keeps between rounds
    artefacts/            models that the device runs or ran before
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from fedq.errors import ConfigError, FedqError
from fedq.fleet import identity
from fedq.fleet.identity import Pair

FLEET, DEVICE = "fleet.json", "device.json"
DEFAULT_PORT = 9443
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?")


def checked_name(name: str) -> str:
    """Return a device's or fleet's name; it becomes a file name and part of unit files."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' is no name: use up to 40 lower-case letters, digits and hyphens"
        )
    return name


def checked_host(host: str) -> str:
    """Return a host name or address; it becomes part of unit files."""
    if not _HOST.fullmatch(host):
        raise ConfigError(f"'{host}' is no host name or address")
    return host


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A fleet as its server knows it.

    Attributes:
      root: The directory.
      name: What the fleet is called.
      server: Host name or address by which devices reach the server.
      listen: Address on which the SuperLink serves devices.
      port: Where devices connect.
      control_port: On loopback alone: runs and registrations.
      devices: Names, in the order in which they joined.
    """

    root: Path
    name: str
    server: str
    listen: str
    port: int
    control_port: int
    devices: tuple[str, ...] = ()

    @classmethod
    def create(
        cls,
        root: Path,
        *,
        name: str,
        server: str,
        port: int = DEFAULT_PORT,
        control_port: int | None = None,
        listen: str = "0.0.0.0",
    ) -> Self:
        """Make a new fleet: its directory, its authority and its server's certificate.

        Raises:
          ConfigError: If there is a fleet, or on wrong names and ports.
        """
        if (root / FLEET).exists():
            raise ConfigError(
                f"{root} is a fleet already; add devices with fedq fleet add, or choose --fleet DIR"
            )
        control_port = port + 1 if control_port is None else control_port
        for value in (port, control_port):
            if not 1 <= value <= 65535:
                raise ConfigError(f"{value} is no port: use 1 to 65535")
        if port == control_port:
            raise ConfigError("--port and --control-port must differ")
        fleet = cls(
            root=root.resolve(),
            name=checked_name(name),
            server=checked_host(server),
            listen=checked_host(listen),
            port=port,
            control_port=control_port,
        )
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)
        ca = identity.authority(name)
        fleet._keep("ca", ca)
        fleet.renew()
        fleet.save()
        return fleet

    @classmethod
    def open(cls, root: Path) -> Self:
        """Read a fleet's directory."""
        data = read_json(root / FLEET, f"no fleet in {root}; make one with fedq fleet init")
        try:
            devices = tuple(data.pop("devices"))
            return cls(root=root.resolve(), devices=devices, **data)
        except (KeyError, TypeError) as error:
            raise FedqError(f"{root / FLEET} is not of this version of fedq: {error}") from None

    def save(self) -> None:
        """Write ``fleet.json``."""
        data = asdict(self)
        del data["root"]
        write_json(self.root / FLEET, data)

    def path(self, name: str) -> Path:
        """Return a file of the fleet."""
        return self.root / name

    @property
    def ca(self) -> Pair:
        """The authority, with its key."""
        return Pair(*(_read(self.path(f"ca.{end}")) for end in ("crt", "key")))

    @property
    def control_address(self) -> str:
        """Where the server's administrator connects."""
        return f"127.0.0.1:{self.control_port}"

    @property
    def device_address(self) -> str:
        """Where devices connect."""
        host = f"[{self.server}]" if ":" in self.server else self.server
        return f"{host}:{self.port}"

    def renew(self, days: float = identity.SERVER_DAYS) -> None:
        """Make a new key and certificate for the server."""
        hosts = [self.server, "localhost", "127.0.0.1"]
        self._keep("server", identity.server_certificate(self.ca, hosts, days))

    def _keep(self, name: str, pair: Pair) -> None:
        identity.write_private(self.path(f"{name}.key"), pair.key)
        replace_file(self.path(f"{name}.crt"), pair.certificate)

    def with_device(self, name: str, public_key: bytes) -> Self:
        """Return the fleet with a device, new or with a new key; both are written."""
        checked_name(name)
        identity.public_pem(public_key)  # refuses what Flower would
        (self.root / "devices").mkdir(exist_ok=True)
        replace_file(self.public_key(name), public_key)
        fleet = replace(self, devices=tuple(dict.fromkeys((*self.devices, name))))
        fleet.save()
        return fleet

    def without_device(self, name: str) -> Self:
        """Return the fleet without a device; its key and bundle are removed."""
        self.require(name)
        fleet = replace(self, devices=tuple(other for other in self.devices if other != name))
        fleet.save()
        self.public_key(name).unlink(missing_ok=True)
        self.bundle(name).unlink(missing_ok=True)
        return fleet

    def require(self, name: str) -> None:
        """Raise :class:`ConfigError` unless there is such a device."""
        if name not in self.devices:
            known = ", ".join(self.devices) or "none yet"
            raise ConfigError(f"no device '{name}' in this fleet (devices: {known})")

    def public_key(self, name: str) -> Path:
        """Return where a device's public key is."""
        return self.root / "devices" / f"{name}.pub"

    def bundle(self, name: str) -> Path:
        """Return where a device's enrolment bundle is."""
        return self.root / "bundles" / f"{name}.tar"

    def nodes(self) -> dict[str, bytes]:
        """Return each device's public key as Flower names it, PEM."""
        return {name: identity.public_pem(_read(self.public_key(name))) for name in self.devices}

    def pid(self) -> int | None:
        """Return the SuperLink's process id, None if it does not run."""
        return lock_holder(self.path("superlink.lock"))


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device as it knows itself.

    Attributes:
      root: The directory.
      name: What the fleet calls it.
      server: Where the SuperLink is, ``host:port``.
      node: Flower's node configuration: ``data``, ``data-path``, ``partition-id`` ...
      heartbeat_s: Within twice this time the server notices that a working device is gone.
      wait_s: How long one request for work stays open while there is none.
      timeout_s: Silence of the server, beyond that, after which a connection is given up.
      chunk_bytes: Largest piece of an update that is sent, and on failure sent again, at once.
      idle_s: Without work for so long, the trainer's memory is given back.
    """

    root: Path
    name: str
    server: str
    node: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    heartbeat_s: float = 20.0
    wait_s: float = 90.0
    timeout_s: float = 60.0
    chunk_bytes: int = 128 * 1024
    idle_s: float = 600.0

    @classmethod
    def open(cls, root: Path) -> Self:
        """Read a device's directory."""
        data = read_json(root / DEVICE, f"no device in {root}; join a fleet with fedq fleet join")
        try:
            return cls(root=root.resolve(), **data)
        except TypeError as error:
            raise FedqError(f"{root / DEVICE} is not of this version of fedq: {error}") from None

    def save(self) -> None:
        """Write ``device.json``."""
        data = asdict(self)
        del data["root"]
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)
        write_json(self.root / DEVICE, data)

    @property
    def ca(self) -> Path:
        """The authority that signs the server's certificate."""
        return self.root / "ca.crt"

    @property
    def key(self) -> Path:
        """The device's private key."""
        return self.root / "key"

    @property
    def state(self) -> Path:
        """What the device keeps."""
        return self.root / "state"

    @property
    def artefacts(self) -> Path:
        """The models that the device runs."""
        return self.root / "artefacts"


# --- locks ---------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file with this process's id in it; the lock ends with the process.

    Raises:
      FedqError: With ``otherwise`` and the holder's id if another process holds it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FedqError(f"{otherwise} (process {os.read(fd, 20).decode().strip()})") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds a lock file, None if nobody does."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.read(fd, 20).strip()
        return int(text) if text.isdigit() else None
    else:
        return None
    finally:
        os.close(fd)


def end_process(path: Path, patience_s: float = 15.0) -> bool:
    """End the process that holds a lock file; return whether there was one."""
    pid = lock_holder(path)
    if pid is None:
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if lock_holder(path) is None:
                return True
            time.sleep(0.05)
    raise FedqError(f"process {pid} does not end; look at it with ps -p {pid}")


# --- JSON ----------------------------------------------------------------------------------------


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, whole or not at all."""
    replace_file(path, (json.dumps(data, indent=2) + "\n").encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FedqError(f"{error}; restore it, or make a new fleet") from None


def read_json(path: Path, absent: str) -> dict[str, Any]:
    """Read a JSON object; a :class:`ConfigError` with ``absent`` if the file is not there."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(absent) from None
    except OSError as error:
        raise FedqError(str(error)) from None
    except ValueError as error:
        raise FedqError(f"{path} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise FedqError(f"{path} is damaged: not an object")
    return data
