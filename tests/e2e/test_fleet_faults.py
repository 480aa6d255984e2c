"""A run on real processes while one thing after the other goes wrong, with one device at a time.

The run has no end. In each case the rounds go on without the device, its log says what happened in
one line, and it takes part again without hands. ``FEDQ_FAULTS=full`` has the real lengths of cuts.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedq.fleet import demo, flower
from fedq.fleet.bundle import enrol, join
from fedq.fleet.files import Device, Fleet
from fedq.fleet.link import Link
from fedq.fleet.meter import Meter
from tests.e2e import lossy
from tests.e2e.faulty import STEPS
from tests.e2e.test_fleet import RUN_S, fedq, register, rounds, summary, until

# Faults come at moments of real processes: on a crowded machine one may come too late.
pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=1)]

FULL = os.environ.get("FEDQ_FAULTS") == "full"
SHORT_CUT_S, LONG_CUT_S = (25.0, 90.0) if FULL else (2.0, 9.0)
#: Short cuts are within the deadline, long ones beyond.
DEADLINE_S = 40.0 if FULL else 6.0
PATIENT, HURRIED = "round_deadline_s=300", f"round_deadline_s={DEADLINE_S:g}"
ENDLESS = 100_000
#: A device that is killed, one whose link is meddled with, one behind a network of its own.
KILLED, PROXIED, DISTANT = range(3)
OPTIONS = (
    *("data=digits", "codec=top_k_feedback", "clients_per_round=3", "baseline=false"),
    *("local_epochs=1", "quorum=0.3", "guard.quarantine_rounds=2"),
)
DISK_MB = 4


@dataclass
class Gauntlet:
    """A fleet, its devices' processes and a run that goes on."""

    fleet: Fleet
    devices: list[Device]
    meters: list[Meter]
    network: lossy.LossyNetwork | None
    run: Path
    stack: ExitStack
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    server: subprocess.Popen[bytes] | None = None
    mode: str = ""

    def start(self, number: int) -> None:
        prefix = self.network.prefix if self.network and number == DISTANT else []
        command = [*prefix, sys.executable, "-m", "tests.e2e.faulty"]
        one = self.devices[number]
        (one.root / "faults").mkdir(exist_ok=True)
        self.running[number] = self.stack.enter_context(demo.process(one, command))

    def stop(self, number: int) -> None:
        process = self.running.pop(number)
        process.terminate()
        process.wait()

    @property
    def words(self) -> str:
        """What the runs said."""
        return (self.run.parent / "run.log").read_text()

    def train(self, *options: str) -> subprocess.Popen[bytes]:
        with (self.run.parent / "run.log").open("ab") as log:
            self.server = subprocess.Popen(
                [*fedq_command("run", "--json", "--fleet", str(self.fleet.root)), *options],
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.stack.callback(self.server.wait)
        self.stack.callback(self.server.kill)
        return self.server

    def end(self) -> None:
        """Kill the run."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()
        self.mode = ""

    def resume(self, *options: str) -> subprocess.Popen[bytes]:
        """Kill the run and have another process go on with it."""
        self.end()
        return self.train("--wait", "60", f"resume={self.run}", *options)

    def keep_on(self, mode: str) -> None:
        """Have the run going on with an option: tests may come in any order."""
        if mode != self.mode:
            self.resume(mode, f"rounds={ENDLESS}")
            self.mode = mode
            self.goes_on()

    def log(self, number: int) -> str:
        return (self.devices[number].root / "device.log").read_text()

    def replied(self, number: int) -> int:
        """The last round that a device says it replied to."""
        return max(map(int, re.findall(r"round (\d+): replied", self.log(number))), default=0)

    def records(self, after: int) -> list[dict[str, Any]]:
        lines = (self.run / "rounds.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if r["round"] > after]

    def goes_on(self, more: int = 2) -> None:
        """Wait for some more rounds."""
        wanted = rounds(self.run) + more
        self._until(lambda: rounds(self.run) >= wanted, f"round {wanted}")

    def is_back(self, number: int) -> None:
        """Wait until a device replies in a round that has not begun yet."""
        wanted = rounds(self.run) + 2
        self._until(lambda: self.replied(number) >= wanted, f"device {number} in round {wanted}")

    def says(self, number: int, words: str) -> None:
        self._until(lambda: words in self.log(number), words)

    def _until(self, condition: Any, what: str) -> None:
        assert self.server is not None
        server = self.server
        with suppress(AssertionError):
            until(lambda: condition() or server.poll() is not None, what)
        logs = [self.log(number)[-2000:] for number in range(len(self.devices))]
        assert server.poll() is None, (what, self.words, logs)
        assert condition(), (what, logs)

    @contextmanager
    def fault(self, number: int, name: str, words: str) -> Iterator[None]:
        path = self.devices[number].root / "faults" / name
        path.write_text(words)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def fedq_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fedq.cli", "fleet", *arguments]


@pytest.fixture(scope="module")
def gauntlet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gauntlet]:
    root = tmp_path_factory.mktemp("faults")
    with ExitStack() as stack:
        fleet = demo.make_fleet(root / "server", 3)
        network = None if lossy.missing() else stack.enter_context(lossy.LossyNetwork())
        if network is not None:
            fleet = replace(fleet, server=network.host)
            fleet.renew()
        stack.enter_context(demo.up(fleet))
        meters, devices = [], []
        for number, name in enumerate(fleet.devices):
            distant = network is not None and number == DISTANT
            host = network.host if network is not None and distant else "127.0.0.1"
            meters.append(stack.enter_context(Meter(fleet.port, host=host)))
            one = demo.make_device(
                fleet, name, root, number, meters[number].port,
                heartbeat_s=60.0 if number == KILLED else 10.0, wait_s=3.0, timeout_s=4.0,
            )  # fmt: skip
            one = replace(one, server=f"{host}:{meters[number].port}")
            one.save()
            devices.append(one)
        found = Gauntlet(fleet, devices, meters, network, root / "run", stack)
        for number in range(len(devices)):
            found.start(number)
        found.mode = PATIENT
        found.train("--wait", "60", *OPTIONS, PATIENT, f"rounds={ENDLESS}", f"run_dir={found.run}")
        found.goes_on()
        yield found


@pytest.fixture
def patient(gauntlet: Gauntlet) -> Gauntlet:
    """A run whose rounds wait for those who are killed."""
    gauntlet.keep_on(PATIENT)
    return gauntlet


@pytest.fixture
def hurried(gauntlet: Gauntlet) -> Gauntlet:
    """A run whose rounds do not wait long for those who are gone."""
    gauntlet.keep_on(HURRIED)
    return gauntlet


# --- processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_device_killed_at_any_step_loses_no_update(patient: Gauntlet, step: str) -> None:
    before, process = rounds(patient.run), patient.running[KILLED]
    with patient.fault(KILLED, "die", step):
        assert process.wait(RUN_S) == -9
    patient.start(KILLED)
    patient.is_back(KILLED)
    for record in patient.records(before):
        assert record["replies"] == 3, (record, patient.log(KILLED))


@pytest.mark.parametrize(
    ("fault", "words", "said"),
    [
        ("oom", "", "the training process died: SIGKILL, out of memory?"),
        ("memory", "10", "MemoryError"),
    ],
)
def test_a_trainer_out_of_memory_costs_its_update(
    patient: Gauntlet, fault: str, words: str, said: str
) -> None:
    before = rounds(patient.run)
    with patient.fault(KILLED, fault, words):
        patient.goes_on()
        patient.says(KILLED, said)
    patient.is_back(KILLED)
    reasons = [reason for record in patient.records(before) for reason in record["reasons"]]
    assert any(said in reason for reason in reasons), reasons


def test_a_device_with_an_old_version_is_told_to_upgrade(hurried: Gauntlet) -> None:
    hurried.stop(PROXIED)
    with hurried.fault(PROXIED, "version", "0.0.9"):
        hurried.start(PROXIED)
        hurried.says(PROXIED, "this device has fedq 0.0.9, the server")
        hurried.goes_on()
        hurried.stop(PROXIED)
    hurried.start(PROXIED)
    hurried.is_back(PROXIED)


# --- what a device has ---------------------------------------------------------------------------


def test_a_clock_that_goes_wrong_and_is_set_again(hurried: Gauntlet) -> None:
    with hurried.fault(PROXIED, "clock", "3600"):
        hurried.says(PROXIED, "s ahead of the server's; set it")
        hurried.goes_on()
    hurried.is_back(PROXIED)


def test_a_full_disk_costs_the_update_and_nothing_else(
    hurried: Gauntlet, request: pytest.FixtureRequest
) -> None:
    state = hurried.devices[PROXIED].state
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(state)]
    hurried.stop(PROXIED)
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True, check=False).returncode:
        hurried.start(PROXIED)
        pytest.skip("needs root, to mount a small file system")
    try:
        hurried.start(PROXIED)
        hurried.is_back(PROXIED)
        filler = state / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        hurried.says(PROXIED, os.strerror(errno.ENOSPC))
        hurried.goes_on()
        filler.unlink()
        hurried.is_back(PROXIED)
        hurried.stop(PROXIED)
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)
    hurried.start(PROXIED)


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cut_s", [SHORT_CUT_S, LONG_CUT_S])
def test_connections_are_cut(hurried: Gauntlet, cut_s: float) -> None:
    said = hurried.log(PROXIED).count("connected again")
    hurried.meters[PROXIED].cut()
    time.sleep(cut_s)
    hurried.meters[PROXIED].mend()
    hurried.is_back(PROXIED)
    assert hurried.log(PROXIED).count("connected again") > said
    hurried.goes_on()


@pytest.mark.parametrize("cut_s", [SHORT_CUT_S, LONG_CUT_S])
@pytest.mark.skipif(bool(lossy.missing()), reason=lossy.missing())
def test_a_network_is_gone_and_comes_back(hurried: Gauntlet, cut_s: float) -> None:
    assert hurried.network is not None
    hurried.network.loss = 1.0
    time.sleep(cut_s)
    hurried.network.loss = 0.0
    hurried.is_back(DISTANT)
    hurried.goes_on()


@pytest.mark.skipif(bool(lossy.missing()), reason=lossy.missing())
def test_thirty_percent_of_packets_are_lost(hurried: Gauntlet) -> None:
    assert hurried.network is not None
    lost = hurried.network.lost
    hurried.network.loss = 0.3
    try:
        for _ in range(2):
            hurried.is_back(DISTANT)
        assert hurried.network.lost > lost
    finally:
        hurried.network.loss = 0.0


def test_half_open_connections_are_given_up(hurried: Gauntlet) -> None:
    hurried.meters[PROXIED].swallow()
    hurried.says(PROXIED, "timed out")
    hurried.goes_on()
    hurried.meters[PROXIED].mend()
    hurried.is_back(PROXIED)


# --- who is hostile, and who is not let in -------------------------------------------------------


def test_garbage_in_place_of_updates(hurried: Gauntlet) -> None:
    before = rounds(hurried.run)
    with hurried.fault(PROXIED, "garbage", "nonsense" * 1000):
        for _ in range(4):  # strikes come with rounds that it is asked in and answers in time
            hurried.goes_on(3)
            if any(record["quarantined"] for record in hurried.records(before)):
                break
    hurried.is_back(PROXIED)  # after its quarantine
    found = hurried.records(before)
    assert any(record["rejected"].get("malformed") for record in found)
    assert any(record["quarantined"] for record in found)
    assert all(record["replies"] >= 2 for record in found)


def test_garbage_from_a_device_that_is_let_in(hurried: Gauntlet) -> None:
    link = Link(hurried.devices[KILLED])
    try:
        names = [name for name in dir(flower.FleetHttpClient) if name[0].isupper()]
        assert len(names) >= 10
        for name in names:
            for body in (b"", b"\xff" * 1000, os.urandom(60_000)):
                request = Raw(body)
                with pytest.raises(httpx.HTTPStatusError) as caught:
                    getattr(link, name)(request)
                assert 400 <= caught.value.response.status_code < 500, name
    finally:
        link.close()
    hurried.goes_on()


class Raw:
    """A request that is no message."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def SerializeToString(self, **options: bool) -> bytes:
        return self._body


def test_strangers_stay_outside_and_a_rotated_key_counts(hurried: Gauntlet, tmp_path: Path) -> None:
    other = demo.make_fleet(tmp_path / "other", 1)
    with ExitStack() as stack:
        for name, words in (("ca", "not from this device's fleet"), ("key", "does not accept")):
            one = demo.make_device(other, "device-0", tmp_path / name, 0, hurried.fleet.port)
            if name == "key":
                one.ca.write_bytes(hurried.fleet.path("ca.crt").read_bytes())
            stack.enter_context(demo.process(one))
            log = one.root / "device.log"
            until(lambda log=log, words=words: words in log.read_text(), words)
            assert log.read_text().count("\n") == 2  # who connects where, and why not
    fleet, code = enrol(hurried.fleet, "device-1")  # the old key does not count any more
    register(fleet)
    hurried.says(PROXIED, "does not accept this device's key")
    hurried.goes_on()
    one = hurried.devices[PROXIED]
    hurried.stop(PROXIED)
    again = join(fleet.bundle(one.name), code, one.root, {})
    replace(again, server=one.server).save()
    hurried.start(PROXIED)
    hurried.is_back(PROXIED)


# --- and in the end ------------------------------------------------------------------------------


def test_nothing_that_was_aggregated_is_lost(hurried: Gauntlet) -> None:
    before = hurried.records(-1)
    last = before[-1]["round"] + 6
    process = hurried.resume(f"rounds={last}")
    assert process.wait(RUN_S) == 0, hurried.words
    assert summary(hurried.run)["rounds"] == last
    after = hurried.records(-1)
    assert [record["round"] for record in after] == list(range(last + 1))
    assert after[: len(before)] == before
    assert not any(record["skipped"] for record in after)


def test_an_uplink_of_20_kb_s_delivers(gauntlet: Gauntlet, tmp_path: Path) -> None:
    run, meter = tmp_path / "run", gauntlet.meters[PROXIED]
    gauntlet.end()
    before, meter.up_bytes_s = meter.up_bytes, 20_000.0
    process = gauntlet.train(
        "--wait", "60", *OPTIONS, "codec=identity", "rounds=2", f"run_dir={run}"
    )
    assert process.wait(RUN_S) == 0, gauntlet.words
    meter.up_bytes_s = 0.0
    found = summary(run)
    assert found["rejected"] == {}
    sent = found["uplink_bytes"] / 3
    assert sent < meter.up_bytes - before < 1.1 * sent + 50_000  # nothing was sent twice
    told = json.loads(fedq("fleet", "status", "--fleet", gauntlet.fleet.root, "--json").stdout)
    report = {one["name"]: one["report"] for one in told["devices"]}["device-1"]
    assert 10_000 < report["up_bytes_s"] < 30_000
