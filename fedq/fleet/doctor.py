"""Check a fleet: who can reach what, what will stop working soon, which device is off.

On the server: permissions, certificates, ports, and what devices report. On a device: its data, its
key, its clock and whether the server accepts it.
"""

from __future__ import annotations

import datetime
import getpass
import ipaddress
import ssl
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fedq
from fedq.data.base import of_node
from fedq.doctor import Check, Status
from fedq.errors import ConfigError, FedqError
from fedq.fleet import flower, identity, status
from fedq.fleet.files import DEVICE, Device, Fleet
from fedq.fleet.link import AHEAD_S, BEHIND_S

SOON_DAYS = 30
TIMEOUT_S = 10.0
SILENT_S = 600.0
#: A request to the address of devices that only administrators may make.
_FORBIDDEN = "/v1/control/list-nodes"


def check_fleet(fleet: Fleet) -> list[Check]:
    """Return every finding about a fleet, on its server."""
    return [
        *_versions(),
        *_permissions(fleet),
        *_certificates(fleet),
        *_ports(fleet),
        *_devices(fleet),
    ]


def check_device(device: Device) -> list[Check]:
    """Return every finding about a device, on the device."""
    found = [*_versions(), check_data(device)]
    try:
        identity.load_openssh(device.key)
        found.append(Check("key", "ok", "readable by its owner alone"))
    except FedqError as error:
        found.append(_explained("key", error))
        return found
    from fedq.fleet import device as process

    try:
        node_id = process.check(device)
        found.append(Check("server", "ok", f"{device.server} accepts {device.name} as {node_id}"))
    except FedqError as error:
        found.append(_explained("server", error))
    return found


def check_data(device: Device) -> Check:
    """Return whether a device can read what it is to train on; its own files are read whole."""
    node, file = device.node, device.root / DEVICE
    if "data" not in node:
        if "num-partitions" in node:
            return Check("data", "ok", "a share of the run's")
        remedy = f'name it: "data" and "data-path" under "node" in {file}, or join with --node'
        return Check("data", "fail", "this device has none", remedy)
    path, entry = node.get("data-path"), f'"data-path" under "node" in {file}'
    try:
        data = of_node(node)
        if path is None:  # it comes with fedq, or is downloaded by the first round
            return Check("data", "ok", str(node["data"]))
        if wrong := _unreadable(Path(str(path)).expanduser()):
            remedy = f"put the data there, or correct {entry}"
            return Check("data", "fail", f"{path} {wrong}", remedy)
        examples = len(data.load().y_train)
    except ConfigError as error:
        what, _, remedy = str(error).partition("; ")
        remedy = remedy or f"see fedq help data={node['data']}; the path is {entry}"
        return Check("data", "fail", what, remedy)
    return Check("data", "ok", f"{examples} training examples in {path}")


def _unreadable(path: Path) -> str:
    """Return why nothing can be read from a path, empty if something can."""
    try:
        if path.is_dir():
            return "" if any(path.iterdir()) else "is an empty folder"
        with path.open("rb") as file:
            return "" if file.read(1) else "is an empty file"
    except FileNotFoundError:
        return "does not exist"
    except PermissionError:
        return f"may not be read by {getpass.getuser()}, as whom the device must run, too"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _explained(name: str, error: FedqError) -> Check:
    what, _, remedy = str(error).partition("; ")
    return Check(name, "fail", what, remedy)


def _versions() -> Iterator[Check]:
    try:
        flower.require_known()
        yield Check("flwr", "ok", f"{flower.KNOWN}x")
    except FedqError as error:
        yield _explained("flwr", error)


def _permissions(fleet: Fleet) -> Iterator[Check]:
    private = [fleet.root, fleet.path("ca.key"), fleet.path("server.key")]
    private += [fleet.bundle(name) for name in fleet.devices if fleet.bundle(name).exists()]
    private += [path for path in (fleet.path("superlink.db"),) if path.exists()]
    open_: list[str] = []
    for path in private:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            yield Check("permissions", "fail", str(error), "restore it from a backup")
            return
        if mode & 0o077:
            open_.append(f"{path} ({mode:o})")
    if open_:
        fix = f"chmod -R go= {fleet.root}"
        yield Check("permissions", "fail", f"others can read {', '.join(open_)}", fix)
    else:
        yield Check("permissions", "ok", "private keys are the owner's alone")


def _certificates(fleet: Fleet) -> Iterator[Check]:
    now = datetime.datetime.now(datetime.UTC)
    for name, remedy in (("ca", "make a new fleet"), ("server", "fedq fleet rotate server")):
        certificate = fleet.path(f"{name}.crt").read_bytes()
        days = (identity.expires(certificate) - now).days
        detail = f"valid for {days} days" if days >= 0 else f"expired {-days} days ago"
        grade: Status = "fail" if days < 0 else "warn" if days < SOON_DAYS else "ok"
        yield Check(f"{name} certificate", grade, detail, "" if grade == "ok" else remedy)
    certificate = fleet.path("server.crt").read_bytes()
    if not identity.signed_by(certificate, fleet.ca.certificate):
        yield Check("server name", "fail", "not signed by this fleet's CA", remedy)
    elif fleet.server not in identity.hosts(certificate):
        names = ", ".join(identity.hosts(certificate))
        yield Check("server name", "fail", f"not for {fleet.server} but for {names}", remedy)
    else:
        yield Check("server name", "ok", f"signed, and for {fleet.server}")


def _ports(fleet: Fleet) -> Iterator[Check]:
    if fleet.pid() is None:
        yield Check("server", "warn", "not up: ports and devices not checked", "fedq fleet up")
        return
    yield Check("server", "ok", f"up, for devices on {fleet.listen}:{fleet.port}")
    reachable = [address for address in listening(fleet.control_port) if not address.is_loopback]
    if reachable:
        where = ", ".join(map(str, reachable))
        remedy = "whoever reaches it can start runs: stop what listens there, or close it"
        yield Check("control port", "fail", f"open on {where}", remedy)
    else:
        yield Check("control port", "ok", f"{fleet.control_port}, on loopback alone")
    context = ssl.create_default_context(cafile=str(fleet.path("ca.crt")))
    host = "127.0.0.1" if fleet.listen in ("0.0.0.0", "localhost") else fleet.listen
    try:
        request = urllib.request.Request(f"https://{host}:{fleet.port}{_FORBIDDEN}", data=b"")
        urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context).close()
        code = 200
    except urllib.error.HTTPError as error:
        code = error.code
        error.close()
    except (OSError, ValueError) as error:
        yield Check("device port", "warn", f"no answer: {error}", "see fedq fleet logs")
        return
    if code == 404:
        yield Check("device port", "ok", "devices reach the Fleet API only")
    else:
        remedy = "start the server with fedq fleet up, not flower-superlink"
        yield Check("device port", "fail", f"runs can be started from it (HTTP {code})", remedy)


def listening(
    port: int, proc: Path = Path("/proc/net")
) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return the addresses of this machine on which something listens on a port (Linux)."""
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    for name in ("tcp", "tcp6"):
        try:
            rows = (proc / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            local, state = row.split()[1], row.split()[3]
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                # Words of four bytes, each as this machine holds it.
                words = [address[at : at + 8] for at in range(0, len(address), 8)]
                packed = b"".join(int(word, 16).to_bytes(4, "little") for word in words)
                found.append(ipaddress.ip_address(packed))
    return found


def _devices(fleet: Fleet) -> Iterator[Check]:
    if fleet.pid() is None:
        return
    try:
        devices = status.collect(fleet)["devices"]
    except FedqError as error:
        yield _explained("devices", error)
        return
    for device in devices:
        yield _device(device)


def _device(device: dict[str, Any]) -> Check:
    name, seen, report = device["name"], device["seen_s_ago"], device["report"]
    if seen is None:
        refused = device["refused"]
        if refused:
            remedy = f"its clock or its key: run fedq fleet node --check on {name}"
            return Check(name, "fail", f"refused {refused} times", remedy)
        return Check(name, "warn", "not seen since the server is up", "start it; see its log")
    detail = f"{device['status']}, seen {seen:.0f} s ago"
    if seen > SILENT_S:
        return Check(name, "warn", detail, "look at its power and network")
    version = report.get("fedq", fedq.__version__)
    if version != fedq.__version__:
        remedy = f"fedq fleet upgrade {name}"
        return Check(name, "warn", f"fedq {version}, here {fedq.__version__}", remedy)
    ahead_s = float(report.get("ahead_s", 0.0))
    if not -BEHIND_S / 2 < ahead_s < AHEAD_S / 2:
        remedy = "on the device: sudo timedatectl set-ntp true"
        return Check(name, "warn", f"its clock is off by {ahead_s:+.0f} s", remedy)
    if report.get("throttled"):
        remedy = "a stronger power supply, or a fan"
        return Check(name, "warn", "throttled: under-voltage or heat", remedy)
    return Check(name, "ok", detail)
