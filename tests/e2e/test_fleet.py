"""A fleet of real processes on loopback: TLS, node authentication, and all that can be killed."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedq import config, simulation
from fedq.cli import main
from fedq.errors import FedqError
from fedq.fleet import control, demo, device, doctor, link, serverapp, superlink
from fedq.fleet.bundle import enrol
from fedq.fleet.files import Device, Fleet
from fedq.fleet.meter import Meter
from tests import command

FEDQ = (sys.executable, "-m", "fedq.cli")
RUN_S = 240
#: One seed's federation: two clients, both in each round.
OPTIONS = (
    *("data=digits", "codec=top_k_feedback", "clients_per_round=2", "baseline=false"),
    *("rounds=4", "local_epochs=4"),
)


def fedq(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return command.run(*arguments, timeout=RUN_S)


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())  # type: ignore[no-any-return]


def rounds(run: Path) -> int:
    try:
        return (run / "rounds.jsonl").read_text().count("\n") - 1
    except FileNotFoundError:
        return -1


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + RUN_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@dataclass
class Shelf:
    """A fleet whose server is up, and its devices, each behind a meter."""

    fleet: Fleet
    devices: list[Device]
    meters: list[Meter]
    stack: ExitStack
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, *numbers: int) -> None:
        for number in numbers:
            one = self.devices[number]
            self.running[one.name] = self.stack.enter_context(demo.process(one))

    def kill(self, number: int) -> None:
        process = self.running.pop(self.devices[number].name)
        process.kill()
        process.wait()

    def log(self, number: int) -> str:
        return (self.devices[number].root / "device.log").read_text()

    def run(self, *options: str | Path) -> command.Command:
        process = command.Command("fleet", "run", "--json", "--fleet", self.fleet.root, *options)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    root = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        fleet = demo.make_fleet(root / "server", 2)
        stack.enter_context(demo.up(fleet))
        meters = [stack.enter_context(Meter(fleet.port)) for _ in fleet.devices]
        # A device is given up after two heartbeats: the first is back before, on any machine, and
        # the second is missed soon.
        beats_s = (60, 10)
        devices = [
            demo.make_device(
                fleet, name, root, number, meters[number].port, heartbeat_s=beats_s[number]
            )
            for number, name in enumerate(fleet.devices)
        ]
        yield Shelf(fleet, devices, meters, stack)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same federation, simulated."""
    run = tmp_path_factory.mktemp("twin") / "run"
    return simulation.run_experiment(config.load([*OPTIONS, "clients=2"]), run).summary


def register(fleet: Fleet) -> None:
    with control.connected(fleet) as client:
        control.sync(client, fleet)


def accepted(one: Device) -> str:
    """What a device that tries its server is told."""
    try:
        return f"node {device.check(one)}"
    except FedqError as error:
        return str(error)


# --- who is let in -----------------------------------------------------------------------------


def test_a_device_with_another_key_or_authority_is_told_what_to_do(
    shelf: Shelf, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = demo.make_fleet(tmp_path / "other", 1)
    stranger = demo.make_device(other, "device-0", tmp_path, 0, shelf.fleet.port)
    assert "not from this device's fleet; join again" in accepted(stranger)
    stranger.ca.write_bytes(shelf.fleet.path("ca.crt").read_bytes())
    assert "does not accept this device's key" in accepted(stranger)
    elsewhere = replace(stranger, server=f"127.0.0.1:{demo.free_ports(1)[0]}")
    assert "cannot be reached" in accepted(elsewhere)
    renamed = replace(stranger, server=f"[::1]:{shelf.fleet.port}")
    assert "cannot be reached" in accepted(renamed)  # nobody listens there
    elsewhere.save()
    capfd.readouterr()
    assert main(["fleet", "node", "--check", str(elsewhere.root)]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_a_wrong_clock_is_named(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import node_auth_http_interceptor as signed

    true, clock = signed.now, time.time
    for hours in (1, -1):
        off = datetime.timedelta(hours=hours)
        monkeypatch.setattr(signed, "now", lambda off=off: true() + off)
        monkeypatch.setattr(link.time, "time", lambda off=off: clock() + off.total_seconds())
        said = re.search(r"is (\d+) s (ahead of|behind) the server", accepted(shelf.devices[0]))
        assert said is not None
        assert abs(int(said[1]) - 3600) < 30
        assert said[2] == ("ahead of" if hours > 0 else "behind")
        monkeypatch.undo()


def test_devices_reach_no_administration(shelf: Shelf) -> None:
    context = ssl.create_default_context(cafile=str(shelf.fleet.path("ca.crt")))
    with httpx.Client(verify=context, trust_env=False) as client:
        for path in ("/v1/control/list-nodes", "/v1/runtime/acquire-task", "/docs"):
            there = client.post(f"https://127.0.0.1:{shelf.fleet.port}{path}")
            here = client.post(f"https://127.0.0.1:{shelf.fleet.control_port}{path}")
            assert there.status_code == 404
            assert here.status_code != 404
    found = {item.name: item.status for item in doctor.check_fleet(shelf.fleet)}
    for name in ("permissions", "control port", "device port", "server certificate"):
        assert found[name] == "ok", name


def test_a_taken_port_and_a_fleet_that_is_up(shelf: Shelf, tmp_path: Path) -> None:
    twin = replace(shelf.fleet, root=tmp_path)
    for name in ("ca.crt", "ca.key", "server.crt", "server.key"):
        twin.path(name).write_bytes(shelf.fleet.path(name).read_bytes())
    twin.save()
    done = fedq("fleet", "up", "--fleet", tmp_path)
    assert done.returncode == 1
    assert f"port {shelf.fleet.port} is taken" in done.stderr
    done = fedq("fleet", "up", "--fleet", shelf.fleet.root, "--json")
    assert json.loads(done.stdout)["started"] is False


def test_removed_and_rotated_keys_do_not_count(shelf: Shelf, tmp_path: Path) -> None:
    fleet, code = enrol(shelf.fleet, "spare")
    fleet.path("codes.json").write_text(json.dumps({"spare": code}))
    register(fleet)
    spare = demo.make_device(fleet, "spare", tmp_path, 0, fleet.port)
    assert accepted(spare).startswith("node ")
    fleet, _ = enrol(fleet, "spare")
    register(fleet)
    assert "does not accept" in accepted(spare)
    register(fleet.without_device("spare"))
    assert "does not accept" in accepted(spare)


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_waits_for_devices_and_says_which(shelf: Shelf) -> None:
    said: list[str] = []
    with pytest.raises(FedqError, match=r"0 of 2 .* missing: device-0, device-1; .*quorum"):
        serverapp.run(shelf.fleet, OPTIONS, wait_s=0.6, say=said.append)
    assert said == ["waiting for devices: 0 of 2 devices on line; missing: device-0, device-1"]


@pytest.mark.slow
def test_whatever_is_killed_the_model_is_that_of_a_simulation(
    shelf: Shelf, twin: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = shelf.run("--wait", "120", *OPTIONS, f"run_dir={run}")
    time.sleep(0.5)  # the devices are late; the run waits for them
    shelf.start(0, 1)

    def reached(number: int) -> None:
        until(lambda: rounds(run) >= number or process.poll() is not None, f"round {number}")
        assert process.poll() is None, process.communicate()

    reached(1)
    until(lambda: (shelf.devices[0].state / "message").exists(), "no message")
    shelf.kill(0)  # with a message
    shelf.start(0)

    reached(2)
    shelf.meters[1].cut()
    pid = shelf.fleet.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)  # the SuperLink
    until(lambda: shelf.fleet.pid() is None, "the server lives")
    superlink.start(shelf.fleet)
    shelf.meters[1].mend()

    reached(3)
    process.kill()  # the ServerApp
    process.communicate()
    process = shelf.run("--wait", "120", f"resume={run}")
    _, error = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, error

    for key in ("model_sha256", "rounds", "rejected", "uplink_bytes", "accuracy"):
        assert summary(run)[key] == twin[key], (key, shelf.log(0), shelf.log(1), error)
    assert "going on with the message of before" in shelf.log(0)
    assert "trying again" in shelf.log(1)


@pytest.mark.slow
def test_a_device_killed_while_it_sends_sends_the_rest(shelf: Shelf, tmp_path: Path) -> None:
    run, meter = tmp_path / "run", shelf.meters[0]
    shelf.start(*(n for n, one in enumerate(shelf.devices) if one.name not in shelf.running))
    process = shelf.run(
        "--wait", "120", *OPTIONS, "codec=identity", "rounds=1", "local_epochs=1", f"run_dir={run}"
    )
    until(lambda: (shelf.devices[0].state / "message").exists(), "no message")
    meter.up_bytes_s, before = 8_000.0, meter.up_bytes
    until(lambda: meter.up_bytes - before > 20_000 or process.poll() is not None, "not sending")
    assert process.poll() is None, process.communicate()
    shelf.kill(0)
    meter.up_bytes_s = 0.0
    shelf.start(0)
    _, error = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, error
    assert summary(run)["rejected"] == {}, (error, shelf.log(0))


@pytest.mark.slow
def test_a_run_goes_on_with_those_who_are_there(shelf: Shelf, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shelf.start(*(n for n, one in enumerate(shelf.devices) if one.name not in shelf.running))
    process = shelf.run("--wait", "120", *OPTIONS, "rounds=2", f"run_dir={run}")
    until(lambda: (shelf.devices[1].state / "message").exists(), "no message")
    shelf.kill(1)
    _, error = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, error
    assert summary(run)["rounds"] == 2
    assert summary(run)["rejected"] == {"error": 1}
    told = json.loads(fedq("fleet", "status", "--fleet", shelf.fleet.root, "--json").stdout)
    assert {one["name"]: one["status"] for one in told["devices"]} == {
        "device-0": "online",
        "device-1": "offline",
    }
    assert told["run"]["round"] == 2
    assert not told["run"]["going_on"]


def test_an_expired_certificate_is_named_and_renewed(shelf: Shelf) -> None:
    superlink.stop(shelf.fleet)
    shelf.fleet.renew(days=-1)
    # Administration does not work with it either: started directly.
    server = subprocess.Popen(
        [*FEDQ, "fleet", "up", "--foreground", "--fleet", shelf.fleet.root],
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: "expired" in accepted(shelf.devices[1]), "not expired")
        assert "fedq fleet rotate server" in accepted(shelf.devices[1])
        found = {item.name: item for item in doctor.check_fleet(shelf.fleet)}
        assert found["server certificate"].status == "fail"
        assert found["server certificate"].remedy == "fedq fleet rotate server"
    finally:
        server.kill()
        server.wait()
    assert main(["fleet", "rotate", "server", "--fleet", str(shelf.fleet.root)]) == 0
    superlink.start(shelf.fleet)
    assert accepted(shelf.devices[1]).startswith("node ")


@pytest.mark.slow
def test_the_demo_is_a_simulation_with_real_wire(twin: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = fedq("fleet", "demo", "--nodes", "2", "--json", *OPTIONS, f"run_dir={run}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["run"] == str(run)
    for key in ("model_sha256", "clients", "rejected", "uplink_bytes", "downlink_bytes"):
        assert found["summary"][key] == twin[key]
    assert (run / "accuracy_vs_bytes.png").exists()
    wire = json.loads((run / "wire.json").read_text())
    for direction in ("up", "down"):
        sent = sum(one[f"{direction}_bytes"] for one in wire.values())
        messages = twin[f"{direction}link_bytes"]
        assert messages < sent < messages + 12_000 * twin["updates"] + 20_000  # some idle, too
