"""What a device does without a server: options, units, installation, profile, reports."""

from __future__ import annotations

import http.server
import ipaddress
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

import fedq
from fedq.errors import ConfigError, FedqError
from fedq.fleet import bench, demo, doctor, health, link, remote, units, wheelhouse
from fedq.fleet.cli import _node_options
from fedq.fleet.files import DEFAULT_PORT, Device, Fleet, locked

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("text", ["state-dir=/", "data", "=x", "run-key=1", "partition=1"])
def test_what_a_device_may_not_be_told(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot use --node"):
        _node_options([text])


def test_a_device_may_say_which_width_its_weights_have() -> None:
    assert _node_options(["weight-bits=4"]) == {"weight-bits": 4}


# --- units ---------------------------------------------------------------------------------------

UNITS: dict[str, Callable[[Path, str], str]] = {
    units.NODE: units.node,
    units.SUPERLINK: units.superlink,
}


@pytest.mark.parametrize("name", UNITS)
def test_units_are_valid(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(UNITS[name](tmp_path, "/bin/true"))
    keys = [line.partition("=")[0] for line in path.read_text().splitlines() if "=" in line]
    assert {"ExecStart", "Restart", "WantedBy"} <= set(keys)
    command = shutil.which("systemd-analyze")
    if command is None:
        return
    done = subprocess.run(
        [command, "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert name not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "made"),
    [
        ("clients/fedq-node.service", units.node(Path("/var/lib/fedq"), "/opt/fedq/bin/fedq")),
        (
            "server/fedq-superlink.service",
            units.superlink(Path("/var/lib/fedq-fleet"), "/opt/fedq/bin/fedq"),
        ),
    ],
)
def test_the_units_of_the_repository_are_the_ones_that_are_made(file: str, made: str) -> None:
    assert (REPOSITORY / file).read_text() == made


@pytest.mark.parametrize("path", ["/a b", "/a\nExecStart=/bin/sh", "/a%h", "/a;b", '/a"b'])
def test_a_path_cannot_add_to_a_unit(path: str) -> None:
    with pytest.raises(ConfigError, match="unit file"):
        units.node(Path(path), "/usr/bin/fedq")


def test_the_compose_file_publishes_the_devices_port_alone() -> None:
    service = yaml.safe_load((REPOSITORY / "server" / "compose.yaml").read_text())["services"]
    assert service["fleet"]["ports"] == [f"{DEFAULT_PORT}:{DEFAULT_PORT}"]
    assert (REPOSITORY / "server" / service["fleet"]["build"]["context"]).resolve() == REPOSITORY


# --- installation --------------------------------------------------------------------------------


def here(home: Path) -> remote.Transport:
    """A device that is a folder of this machine, on which ``fedq`` is this one."""
    bin_ = home / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "fedq").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedq.cli "$@"\n')
    (bin_ / "fedq").chmod(0o755)
    environment = {**os.environ, "HOME": str(home), "PATH": f"{bin_}:/usr/bin:/bin"}

    def run(script: str, data: bytes) -> bytes:
        done = subprocess.run(
            ["sh", "-c", script], input=data, capture_output=True, env=environment, check=False
        )
        if done.returncode:
            raise FedqError(done.stderr.decode().strip().splitlines()[-1])
        return done.stdout

    return run


def test_a_device_is_enrolled_over_a_transport(tmp_path: Path) -> None:
    fleet = Fleet.create(tmp_path / "fleet", name="shelf", server="127.0.0.1", port=1)
    transport = here(tmp_path / "pi")
    node = ["data=npz", "data-path=/data/own data.npz", "partition-id=3"]
    fleet = remote.enroll(fleet, "pi-1", transport, node=node)
    device = Device.open(tmp_path / "pi" / ".fedq" / "device")
    assert device.name == "pi-1"
    assert device.node == {
        "data": "npz", "data-path": "/data/own data.npz", "partition-id": 3,
    }  # fmt: skip
    unit = (device.root / units.NODE).read_text()
    assert re.search(r"^ExecStart=/\S+ fleet node /", unit, re.MULTILINE)  # systemd has no PATH
    assert fleet.devices == ("pi-1",)
    assert not (tmp_path / "pi" / ".fedq" / "pi-1.tar").exists()
    with pytest.raises(FedqError, match="cannot be reached"):
        remote.accepted(transport)
    assert {item.name: item.status for item in doctor.check_device(device)} == {
        "flwr": "ok", "data": "fail", "key": "ok", "server": "fail",
    }  # fmt: skip


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))


def test_installation_needs_fedqs_own_wheel(tmp_path: Path) -> None:
    wheel(tmp_path, "numpy", "2.0")
    with pytest.raises(FedqError, match="no wheel of fedq"):
        remote.install(lambda script, data: b"", tmp_path)
    (tmp_path / "fedq-0.1.0-py3-none-any.whl").write_bytes(b"half a")
    with pytest.raises(FedqError, match="damaged"):
        remote.install(lambda script, data: b"", tmp_path)
    with pytest.raises(ConfigError, match="no host"):
        remote.over_ssh("-oProxyCommand=evil")


def test_what_a_wheelhouse_was_made_for_is_installed(tmp_path: Path) -> None:
    wheel(tmp_path, "fedq", "0.1.0", "numpy", 'ai-edge-litert; extra == "export-litert"')
    wheel(tmp_path, "ai_edge_litert", "2.3.0", "numpy>=1.23")
    wheel(tmp_path, "numpy", "2.0")
    scripts: list[str] = []
    remote.install(lambda script, data: scripts.append(script) or b"", tmp_path)
    assert "--upgrade ai-edge-litert fedq\n" in scripts[0]


def test_the_wheelhouse_is_for_the_device_not_for_this_machine() -> None:
    pins = wheelhouse.pinned("aarch64")
    names = {pin.partition("==")[0] for pin in pins}
    assert {"torch", "flwr", "numpy", "numba", "cryptography"} <= names
    assert not [name for name in names if "nvidia" in name or name == "triton"]
    assert not names & {"ray", "pytest", "ruff", "fedq"}  # extras are no device's
    assert f"flwr=={metadata.version('flwr')}" in pins
    assert not [pin for pin in pins if "+" in pin]


@pytest.mark.parametrize(
    ("torch", "needs", "lacking"),
    [
        ("2.13.0+cpu", [], []),
        ("2.13.0", ["cuda==13; platform_system == 'Linux'"], ["cuda==13"]),
        ("2.13.0", ["cuda==13; platform_machine == 'x86_64'"], []),
        ("2.12.0", [], ["torch<2.14,>=2.13"]),
    ],
)
def test_wheels_that_do_not_install_are_told(
    tmp_path: Path, torch: str, needs: list[str], lacking: list[str]
) -> None:
    wheel(tmp_path, "fedq", fedq.__version__, "torch>=2.13,<2.14")
    wheel(tmp_path, "torch", "2.9", "opencl")  # what an earlier wheelhouse left
    wheel(tmp_path, "torch", torch, *needs)
    assert [text.partition(" needs ")[2] for text in wheelhouse.unmet(tmp_path)] == lacking


# --- what a device says --------------------------------------------------------------------------


def test_a_report_has_what_the_machine_has(tmp_path: Path) -> None:
    proc, sysfs = tmp_path / "proc", tmp_path / "sys"
    assert set(health.report(proc, sysfs)) == {"fedq", "flwr", "clock_s", "load", "cores"}
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "statm").write_text("9999 1000 1 1 0 1 0")
    (proc / "meminfo").write_text("MemTotal: 3943424 kB\nMemAvailable: 409600 kB\n")
    (sysfs / "class/thermal/thermal_zone0").mkdir(parents=True)
    (sysfs / "class/thermal/thermal_zone0/temp").write_text("61250\n")
    (sysfs / "devices/platform/soc/soc:firmware").mkdir(parents=True)
    (sysfs / "devices/platform/soc/soc:firmware/get_throttled").write_text("50005\n")
    found = health.report(proc, sysfs)
    assert found["fedq"] == fedq.__version__
    assert found["free_mb"] == 400
    assert found["ram_mb"] == 3851
    assert found["memory_mb"] == 1000 * os.sysconf("SC_PAGE_SIZE") // 10**6
    assert found["temperature_c"] == 61.2
    assert found["throttled"] == 0x50005


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    health.notify("READY=1")  # nobody asked
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        health.notify("READY=1")
        assert end.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    ("ahead_s", "side"), [(3600, "ahead of"), (6, "ahead of"), (-301, "behind"), (0, None)]
)
def test_a_clock_is_judged_by_the_servers(
    ahead_s: float, side: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = httpx.Response(401, headers={"date": "Tue, 24 Nov 2026 12:00:00 GMT"})
    now = 1_795_521_600.0 + ahead_s
    monkeypatch.setattr(link, "time", SimpleNamespace(time=lambda: now))
    found = link.clock_error(response)
    assert (found is None) == (side is None)
    if side:
        assert f"{abs(ahead_s):.0f} s {side} the server's; set it" in str(found)
    assert link.clock_error(httpx.Response(401)) is None


@pytest.mark.parametrize(
    ("change", "status", "what"),
    [
        ({}, "ok", "online"),
        ({"report": {"fedq": "9.9.9"}}, "warn", "upgrade pi-1"),
        ({"report": {"ahead_s": 4.0}}, "warn", "timedatectl"),
        ({"report": {"ahead_s": -200.0}}, "warn", "timedatectl"),
        ({"report": {"throttled": 0x50005}}, "warn", "power supply"),
        ({"seen_s_ago": 3600.0}, "warn", "network"),
        ({"seen_s_ago": None}, "warn", "start it"),
        ({"seen_s_ago": None, "refused": 3}, "fail", "its clock or its key"),
    ],
)
def test_the_doctor_on_devices(change: dict[str, object], status: str, what: str) -> None:
    device = {
        "name": "pi-1", "status": "online", "seen_s_ago": 2.0, "refused": 0, "report": {}, **change,
    }  # fmt: skip
    found = doctor._device(device)
    assert found.status == status
    assert what in found.detail + found.remedy


@pytest.mark.parametrize(
    ("node", "what"),
    [
        ({}, ["has none", '"data" and "data-path" under "node" in', "device.json"]),
        ({"data": "npz"}, ["needs data.path", '"data-path" under "node" in', "device.json"]),
        ({"data": "npz", "data-path": "missing.npz"}, ["missing.npz does not exist", "data-path"]),
        ({"data": "npz", "data-path": "empty.npz"}, ["empty.npz is an empty file", "data-path"]),
        ({"data": "npz", "data-path": "text.npz"}, ["not a readable .npz", "fedq help data=npz"]),
        ({"data": "npz", "data-path": "text.npz/x"}, ["cannot be read: Not a directory"]),
        ({"data": "folder", "data-path": "empty"}, ["is an empty folder"]),
        ({"data": "nzp", "data-path": "own.npz"}, ["did you mean 'npz'"]),
        ({"data": "npz", "data-path": "closed.npz"}, ["may not be read by"]),
    ],
)
def test_the_doctor_on_a_devices_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: dict[str, str], what: list[str]
) -> None:
    (tmp_path / "empty.npz").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("x_train")
    closed, opened = tmp_path / "closed.npz", Path.open

    def refuse(path: Path, *options: Any) -> Any:  # also for root, who may read everything
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return opened(path, *options)

    monkeypatch.setattr(Path, "open", refuse)
    if "data-path" in node:
        node = {**node, "data-path": str(tmp_path / node["data-path"])}
    device = Device(root=tmp_path / "device", name="pi-1", server="pi.example:1", node=node)
    found = doctor.check_data(device)
    assert found.status == "fail"
    for part in what:
        assert part in f"{found.detail}; {found.remedy}"


def test_the_doctor_reads_a_devices_own_data(tmp_path: Path) -> None:
    x, y = np.zeros((7, 4), np.float32), np.arange(7) % 2
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    node = {"data": "npz", "data-path": str(tmp_path / "own.npz")}
    device = Device(root=tmp_path / "device", name="pi-1", server="pi.example:1", node=node)
    found = doctor.check_data(device)
    assert (found.status, found.detail) == ("ok", f"7 training examples in {tmp_path}/own.npz")
    for node in ({"data": "digits"}, {"partition-id": 1, "num-partitions": 3}):
        assert doctor.check_data(replace(device, node=node)).status == "ok"


def test_the_doctor_on_files_and_certificates(tmp_path: Path) -> None:
    fleet = Fleet.create(tmp_path / "fleet", name="shelf", server="pi.example")

    def found(fleet: Fleet = fleet) -> dict[str, str]:
        return {item.name: item.status for item in doctor.check_fleet(fleet)}

    assert found() == {
        "flwr": "ok", "permissions": "ok", "ca certificate": "ok",
        "server certificate": "ok", "server name": "ok", "server": "warn",
    }  # fmt: skip
    fleet.path("server.key").chmod(0o644)
    assert found()["permissions"] == "fail"
    fleet.path("server.key").chmod(0o600)
    fleet.renew(days=10)
    assert found()["server certificate"] == "warn"
    other = Fleet.create(tmp_path / "other", name="shelf", server="else.example")
    fleet.path("server.crt").write_bytes(other.path("server.crt").read_bytes())
    assert found()["server name"] == "fail"
    for name in ("ca.crt", "ca.key"):
        fleet.path(name).write_bytes(other.path(name).read_bytes())
    assert found()["server name"] == "fail"  # signed, but for another name


class Answering:
    """A server of the device port, on loopback."""

    def __init__(self, fleet: Fleet, status: int) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                """Say nothing."""

        self.server = http.server.HTTPServer(("127.0.0.1", fleet.port), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(fleet.path("server.crt"), fleet.path("server.key"))
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize(
    ("answer", "address", "expected"),
    [
        (404, "127.0.0.1", {"device port": "ok", "control port": "ok"}),
        (401, "127.0.0.1", {"device port": "fail", "control port": "ok"}),
        (200, "192.0.2.7", {"device port": "fail", "control port": "fail"}),
        (None, "::", {"device port": "warn", "control port": "fail"}),
    ],
)
def test_the_doctor_on_ports(
    answer: int | None,
    address: str,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is on the server's ports when something else than fedq fleet up was started there."""
    port, control_port = demo.free_ports(2)
    fleet = Fleet.create(
        tmp_path / "fleet", name="shelf", server="127.0.0.1", port=port, control_port=control_port
    )
    monkeypatch.setattr(doctor, "listening", lambda port: [ipaddress.ip_address(address)])
    server = None if answer is None else Answering(fleet, answer)
    try:
        with locked(fleet.path("superlink.lock"), "taken"):
            found = {item.name: item for item in doctor.check_fleet(fleet)}
    finally:
        if server is not None:
            server.close()
    assert {name: found[name].status for name in expected} == expected
    assert all(item.remedy for item in found.values() if item.status != "ok")
    assert found["devices"].status == "fail"  # nobody answers for them


def test_the_addresses_that_listen(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st\n"
    (tmp_path / "tcp").write_text(
        head + "   0: 0100007F:24E4 00000000:0000 0A\n   1: 00000000:24E4 00000000:0000 0A\n"
        "   2: 0100007F:24E4 0100007F:1234 01\n   3: 0A00000A:24E5 00000000:0000 0A\n"
    )
    (tmp_path / "tcp6").write_text(head + f"   0: {'0' * 24}01000000:24E4 {'0' * 32}:0000 0A\n")
    assert [str(one) for one in doctor.listening(0x24E4, tmp_path)] == [
        "127.0.0.1", "0.0.0.0", "::1",
    ]  # fmt: skip
    assert doctor.listening(1, tmp_path / "absent") == []


def test_a_profile_is_measured() -> None:
    found = bench.profile()
    assert found["parameters"] == 55_338
    for key in ("step_ms", "images_s", "encode_mb_s", "decode_mb_s", "payload_bytes", "peak_mb"):
        assert found[key] > 0
    assert found["cores"] >= 1
