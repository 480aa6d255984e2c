"""What a device costs on the network and in memory: fedq's node beside Flower's own.

A fleet on loopback, TLS and node authentication on. `fedq fleet node` and Flower's
`flower-supernode` are watched while idle, side by side. Then each in turn is the one device on
line that does the same runs on the same 200 images, one whose messages are small and one with
float32 weights both ways. A proxy counts bytes: TLS, retries and polling included, TCP and IP
headers not.

Memory is the sum over the device's processes of the proportional set size, in which a page that
several share counts once: while idle the median, while training the most, of four samples a second.
CPU is of the same processes. Both are per round after the first, in which what stays is started.
Round times are wall times of a machine that may be busy: they stand beside each other only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import _common

from fedq.fleet import demo
from fedq.fleet.files import Device, Fleet
from fedq.fleet.meter import Meter
from fedq.results import read_rounds

DAY_S = 86_400
CONTESTANTS = ("fedq", "flower")
#: Devices among which the data set is split; all but one are off line.
SHARES = 20
COMMON = (
    *("partition=iid", "local_epochs=1", "clients_per_round=1", f"quorum={1 / SHARES}"),
    "baseline=false",
)
WORK = {
    "small messages": ("codec=dithered", "downlink=lattice"),
    "float32 messages": ("codec=identity", "downlink=identity"),
}
MAX_RATIO, MAX_FIXED_BYTES, MAX_IDLE_BYTES = 1.15, 12_000, 3_000_000


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--idle", type=float, default=360.0, help="seconds to watch without work")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    if options.quick:
        options.idle, options.rounds = 2.0, 2
    data = "digits" if options.quick else "mnist5k"
    work: list[dict[str, Any]] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = demo.make_fleet(root / "server", SHARES)
        stack.enter_context(demo.up(fleet))
        meters = {name: stack.enter_context(Meter(fleet.port)) for name in CONTESTANTS}
        devices = {
            name: demo.make_device(fleet, place, root, 0, meters[name].port)
            for name, place in zip(CONTESTANTS, fleet.devices, strict=False)
        }
        idle = measure_idle(fleet, devices, meters, options.idle)
        for name, device in devices.items():
            with node(name, device) as process, watched(process.pid) as watch:
                demo.wait_for(fleet, [device.name])
                for title, choice in list(WORK.items())[: 1 if options.quick else None]:
                    overrides = (f"data={data}", f"seed={options.seed}", *choice)
                    run = root / f"{name} {title}"
                    found = measure_work(fleet, run, meters[name], watch, options.rounds, overrides)
                    work.append({"work": title, "node": name, **found})
    write(options, idle, work)


@contextmanager
def node(name: str, device: Device) -> Iterator[subprocess.Popen[bytes]]:
    """Have a contestant on line as the device."""
    if name == "fedq":
        with demo.process(device) as process:
            yield process
        return
    (port,) = demo.free_ports(1)
    config = " ".join(f"{key}={value}" for key, value in device.node.items())
    beside = Path(sys.executable).parent
    with (device.root / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(beside / "flower-supernode", "--superlink", device.server),
                *("--root-certificates", device.ca, "--auth-supernode-private-key", device.key),
                *("--port", str(port), "--node-config", config),
            ],
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "FLWR_HOME": str(device.root / "flwr"),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                "OMP_NUM_THREADS": "1",
                "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
            },
        )
    try:
        yield process
    finally:
        family = _common.process_tree(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in family:
            with contextlib.suppress(OSError):
                os.kill(pid, 9)
        process.wait()


class Watch:
    """CPU and memory of a process tree, sampled."""

    def __init__(self, root: int) -> None:
        self._root, self._cpu = root, dict[int, float]()
        self.memory_mb: list[float] = []
        self.over = threading.Event()

    def sample(self) -> None:
        """Sample until it is over."""
        while not self.over.wait(0.25):
            total = 0.0
            for pid in _common.process_tree(self._root):
                self._cpu[pid] = max(self._cpu.get(pid, 0.0), _common.cpu_seconds(pid))
                with contextlib.suppress(OSError, IndexError):
                    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    total += int(re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[0]) / 1e3
            self.memory_mb.append(total * 1.024)

    @property
    def cpu_s(self) -> float:
        """CPU time of all processes that were seen, ended ones included."""
        return sum(self._cpu.values())


@contextmanager
def watched(pid: int) -> Iterator[Watch]:
    watch = Watch(pid)
    thread = threading.Thread(target=watch.sample)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def measure_idle(
    fleet: Fleet, devices: dict[str, Device], meters: dict[str, Meter], seconds: float
) -> list[dict[str, Any]]:
    """Watch all contestants at once while there is nothing to do."""
    with ExitStack() as stack:
        watches = {}
        for name, device in devices.items():
            process = stack.enter_context(node(name, device))
            watches[name] = stack.enter_context(watched(process.pid))
        demo.wait_for(fleet, [device.name for device in devices.values()])
        time.sleep(min(10.0, seconds))
        before = {name: (meter.up_bytes, meter.down_bytes) for name, meter in meters.items()}
        for watch in watches.values():
            watch.memory_mb.clear()
        start = time.monotonic()
        time.sleep(seconds)
        scale = DAY_S / (time.monotonic() - start) / 1e6
        rows = []
        for name, meter in meters.items():
            up = (meter.up_bytes - before[name][0]) * scale
            down = (meter.down_bytes - before[name][1]) * scale
            rows.append(
                {
                    "node": name,
                    "up_mb_day": up,
                    "down_mb_day": down,
                    "mb_day": up + down,
                    "memory_mb": statistics.median(watches[name].memory_mb),
                }
            )
    return rows


def measure_work(
    fleet: Fleet,
    run: Path,
    meter: Meter,
    watch: Watch,
    rounds: int,
    overrides: tuple[str, ...],
) -> dict[str, Any]:
    """Run on the device; figures per round, without the first."""
    watch.memory_mb.clear()
    command = [sys.executable, "-m", "fedq.cli", "fleet", "run", "--json"]
    own = ("--wait", "0", f"rounds={rounds}", f"run_dir={run}")
    process = subprocess.Popen(
        [*command, "--fleet", fleet.root, *overrides, *COMMON, *own],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    marks: list[tuple[int, int, float]] = []
    try:
        while process.poll() is None or not marks:
            done = lines(run / "rounds.jsonl")
            while len(marks) < done:
                marks.append((meter.up_bytes, meter.down_bytes, watch.cpu_s))
            time.sleep(0.02)
            if process.poll() not in (None, 0):
                raise SystemExit(process.stderr.read() if process.stderr else "the run failed")
    finally:
        process.kill()
        process.communicate()
    records = read_rounds(run)[2:]
    first, last = marks[1], marks[-1]
    count = len(records)
    up = sum(record["uplink_bytes"] for record in records)
    down = sum(record["downlink_bytes"] for record in records)
    wire_up, wire_down = last[0] - first[0], last[1] - first[1]
    seconds = [r["seconds"] - r["evaluation_seconds"] for r in records]
    return {
        "payload_up": up // count,
        "payload_down": down // count,
        "wire_up": wire_up // count,
        "wire_down": wire_down // count,
        "fixed": (wire_up + wire_down - up - down) // count,
        "ratio": (wire_up + wire_down) / (up + down),
        "round_s": statistics.median(seconds),
        "cpu_s": (last[2] - first[2]) / count,
        "memory_mb": max(watch.memory_mb),
        "model_sha256": json.loads((run / "summary.json").read_text())["model_sha256"],
    }


def lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def write(options: Any, idle: list[dict[str, Any]], work: list[dict[str, Any]]) -> None:
    own, theirs = idle
    rows = {(row["work"], row["node"]): row for row in work}
    small, large = WORK
    hashes = {
        name: [row["model_sha256"] for row in work if row["node"] == name] for name in CONTESTANTS
    }
    same = hashes["fedq"] == hashes["flower"]
    text = [
        f"Idle: {own['mb_day']:.2f} MB a day against {theirs['mb_day']:.1f}"
        f" (aim: at most {MAX_IDLE_BYTES / 1e6:.0f});"
        f" {own['memory_mb']:.0f} MB against {theirs['memory_mb']:.0f}.",
        f"Small messages: {rows[small, 'fedq']['fixed']:,} bytes a round beside the messages,"
        f" against {rows[small, 'flower']['fixed']:,} (aim: at most {MAX_FIXED_BYTES:,}).",
        "A round of small messages takes"
        f" {rows[small, 'flower']['round_s'] / rows[small, 'fedq']['round_s']:.1f} times as long"
        f" with Flower's node, and"
        f" {rows[small, 'flower']['cpu_s'] / rows[small, 'fedq']['cpu_s']:.1f} times the CPU time"
        " of the device; memory while training is"
        f" {rows[small, 'fedq']['memory_mb']:.0f} MB against"
        f" {rows[small, 'flower']['memory_mb']:.0f}.",
        f"Both give the same models: {'yes' if same else 'no'}.",
    ]
    if (large, "fedq") in rows:
        text.append(
            f"Large messages: {rows[large, 'fedq']['ratio']:.3f} bytes on the wire per byte of"
            f" message (aim: at most {MAX_RATIO})."
        )
    idle_columns = {
        "node": "idle for " + f"{options.idle:.0f} s",
        "up_mb_day": "up, MB/day",
        "down_mb_day": "down, MB/day",
        "mb_day": "both, MB/day",
        "memory_mb": "memory, MB",
    }
    work_columns = {
        "work": f"work, {options.rounds} rounds",
        "node": "node",
        "payload_up": "message up, B",
        "payload_down": "down, B",
        "wire_up": "wire up, B",
        "wire_down": "wire down, B",
        "fixed": "beside messages, B",
        "round_s": "round, s",
        "cpu_s": "device CPU, s/round",
        "memory_mb": "memory, MB",
    }
    _common.write(
        options.out,
        "fleet",
        "A device's network and memory",
        [
            str(__doc__).strip(),
            _common.table(idle_columns, idle),
            _common.table(work_columns, work),
            "\n".join(f"- {line}" for line in text),
        ],
        {"seed": options.seed, "idle_s": options.idle, "idle": idle, "work": work},
    )


if __name__ == "__main__":
    main()
