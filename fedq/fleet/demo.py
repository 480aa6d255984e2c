"""The whole story on one machine: a fleet, its server, its devices, a run, and what it cost.

Everything is real but the distance: TLS, node authentication, a process per device, the messages.
The devices hold the clients' shares of the run's data set, so that the model is that of ``fedq
simulate`` with as many clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedq import config, progress
from fedq.errors import ConfigError, FedqError
from fedq.fleet import control, superlink
from fedq.fleet.bundle import enrol, join
from fedq.fleet.files import Device, Fleet, write_json
from fedq.fleet.meter import Meter
from fedq.report import report
from fedq.results import WIRE, default_run_path, read_summary

START_S, STOP_S = 120.0, 10.0
MOST_NODES = 200


def run(nodes: int, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Run the demo and return what it found; the run directory stays.

    Args:
      nodes: Devices.
      overrides: As for ``fedq simulate``.
      console: Where to say what goes on.
    """
    if not 1 <= nodes <= MOST_NODES:
        raise ConfigError(f"--nodes must be 1 to {MOST_NODES}, not {nodes}")
    overrides = list(overrides)
    path = Path(config.option(overrides, "run_dir") or default_run_path()).resolve()
    if config.option(overrides, "run_dir") is None:
        overrides.append(f"run_dir={path}")
    config.load([text for text in overrides if not text.startswith("resume=")])
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedq-fleet-")))
        fleet = make_fleet(root / "server", nodes)
        console.print(f"a fleet of {nodes} devices on loopback, TLS and node authentication on")
        stack.enter_context(up(fleet))
        meters = {name: stack.enter_context(Meter(fleet.port)) for name in fleet.devices}
        for number, name in enumerate(fleet.devices):
            device = make_device(fleet, name, root, number, meters[name].port)
            stack.enter_context(process(device))
        wait_for(fleet)
        before = {name: (meter.up_bytes, meter.down_bytes) for name, meter in meters.items()}
        console.print("all devices are on line")
        watch_run(fleet, overrides, console)
        wire = {
            name: {
                "up_bytes": meter.up_bytes - before[name][0],
                "down_bytes": meter.down_bytes - before[name][1],
                "connections": meter.connections,
            }
            for name, meter in meters.items()
        }
    summary = read_summary(path)
    assert summary is not None
    found = {"run": str(path), "wire": wire, "summary": summary}
    write_json(path / WIRE, wire)
    console.print(report([path]))
    console.print(_cost(wire, summary), highlight=False)
    console.print(f"results in {path}", soft_wrap=True, highlight=False)
    return found


def _cost(wire: dict[str, dict[str, int]], summary: dict[str, Any]) -> str:
    lines = []
    for name, key in (("up", "uplink_bytes"), ("down", "downlink_bytes")):
        total = sum(device[f"{name}_bytes"] for device in wire.values())
        more = (total - summary[key]) / max(summary["updates"], 1)
        sent, carried = progress.megabytes(total), progress.megabytes(summary[key])
        each = progress.megabytes(int(more))
        lines.append(
            f"{name}: {sent} on the wire for {carried} of messages, {each} more per update"
        )
    return "\n".join(lines)


def make_fleet(root: Path, devices: int) -> Fleet:
    """Return a new fleet on free ports of loopback; its bundles' codes are in ``codes.json``."""
    port, control_port = free_ports(2)
    fleet = Fleet.create(
        root,
        name="demo",
        server="127.0.0.1",
        listen="127.0.0.1",
        port=port,
        control_port=control_port,
    )
    codes = {}
    for number in range(devices):
        name = f"device-{number}"
        fleet, codes[name] = enrol(fleet, name)
    write_json(root / "codes.json", codes)
    return fleet


def make_device(
    fleet: Fleet, name: str, root: Path, number: int, port: int, **changes: Any
) -> Device:
    """Return a device that joined with its bundle and holds a share of the run's data."""
    code = json.loads(fleet.path("codes.json").read_text())[name]
    share = {"partition-id": number, "num-partitions": len(fleet.devices)}
    device = join(fleet.bundle(name), code, root / name, share)
    device = replace(device, server=f"127.0.0.1:{port}", **changes)
    device.save()
    return device


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody uses."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def up(fleet: Fleet) -> Iterator[None]:
    """Have the server up for as long as the context lasts."""
    superlink.start(fleet)
    try:
        yield
    finally:
        superlink.stop(fleet)


@contextmanager
def process(
    device: Device, command: Sequence[str] = (sys.executable, "-m", "fedq.cli", "fleet", "node")
) -> Iterator[subprocess.Popen[bytes]]:
    """Have a device's process for as long as the context lasts; its log is ``device.log``."""
    with (device.root / "device.log").open("ab") as log:
        running = subprocess.Popen(
            [*command, str(device.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield running
    finally:
        running.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(STOP_S)
        running.kill()
        running.wait()


def wait_for(fleet: Fleet, names: Sequence[str] | None = None) -> None:
    """Wait until devices are on line; all of them if not named."""
    wanted, deadline = set(fleet.devices if names is None else names), time.monotonic() + START_S
    while True:
        with control.connected(fleet) as client:
            missing = wanted - set(control.online(client, fleet))
        if not missing:
            return
        if time.monotonic() > deadline:
            raise FedqError(f"not on line after {START_S:.0f} s: {', '.join(sorted(missing))}")
        time.sleep(0.1)


def watch_run(fleet: Fleet, overrides: Sequence[str], console: Console) -> None:
    """Run on the fleet in a process of its own, and show what it says."""
    command = [sys.executable, "-m", "fedq.cli", "fleet", "run", "--json"]
    running = subprocess.Popen(
        [*command, "--fleet", str(fleet.root), *overrides],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        last = ""
        for line in running.stderr or ():
            last = line.rstrip()
            console.print(last, soft_wrap=True, highlight=False, markup=False)
        if running.wait():
            raise FedqError(last.removeprefix("fedq: ") or "the run failed")
    finally:
        running.kill()
        running.wait()
