"""A run on real processes while one thing after the other goes wrong.

The run has no end. Faults of different devices come at the same time, in a lane for each device; in
a lane, one after the other. In each the rounds go on, the device's log says what happened in one
line, and it takes part again without hands. ``FEDQ_FAULTS=full`` has the real lengths of cuts.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedq.fleet import demo, flower
from fedq.fleet.bundle import enrol, join
from fedq.fleet.files import Device, Fleet
from fedq.fleet.link import Link
from fedq.fleet.meter import Meter
from fedq.results import read_rounds
from tests.e2e import lossy
from tests.e2e.faulty import STEPS
from tests.e2e.test_fleet import FEDQ, RUN_S, fedq, register, rounds, summary, until

# Faults come at moments of real processes: on a crowded machine one may come too late.
pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=1)]

FULL = os.environ.get("FEDQ_FAULTS") == "full"
SHORT_CUT_S, LONG_CUT_S = (25.0, 90.0) if FULL else (1.0, 8.0)
#: Short cuts are within the deadline, long ones beyond.
DEADLINE_S = 40.0 if FULL else 6.0
ENDLESS = 100_000
#: A device that is well, one whose link is meddled with, one behind a network of its own.
HEALTHY, PROXIED, DISTANT = range(3)
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

    def heal(self) -> None:
        """Undo what a test that failed may have left."""
        for number, meter in enumerate(self.meters):
            meter.mend()
            if number not in self.running or self.running[number].poll() is not None:
                self.start(number)
        if self.network is not None:
            self.network.loss = 0.0

    @property
    def words(self) -> str:
        """What the runs said."""
        return (self.run.parent / "run.log").read_text()

    def train(self, *options: str) -> subprocess.Popen[bytes]:
        """Have a run, or more of one, in a new process; that of before is killed."""
        self.end()
        with (self.run.parent / "run.log").open("ab") as log:
            self.server = subprocess.Popen(
                [*FEDQ, "fleet", "run", "--json", "--fleet", str(self.fleet.root), *options],
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.stack.callback(self.server.wait)
        self.stack.callback(self.server.kill)
        return self.server

    def end(self) -> None:
        """Kill the run's process."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()

    def go_on(self, *options: str) -> subprocess.Popen[bytes]:
        """Kill the run's process and have another one go on; the first one begins."""
        begun = (self.run / "checkpoint").exists()
        which = [f"resume={self.run}"] if begun else [*OPTIONS, f"run_dir={self.run}"]
        return self.train("--wait", "60", *which, *options)

    def log(self, number: int) -> str:
        return (self.devices[number].root / "device.log").read_text()

    def replied(self, number: int) -> int:
        """The last round that a device says it replied to."""
        return max(map(int, re.findall(r"round (\d+): replied", self.log(number))), default=0)

    def records(self, after: int) -> list[dict[str, Any]]:
        return [record for record in read_rounds(self.run) if record["round"] > after]

    def goes_on(self, more: int = 1) -> None:
        """Wait for some more rounds; one that is under way has begun before."""
        wanted = rounds(self.run) + more
        self.wait(lambda: rounds(self.run) >= wanted, f"round {wanted}")

    def is_back(self, number: int) -> None:
        """Wait until a device replies in a round that has not begun yet."""
        wanted = rounds(self.run) + 2
        self.wait(lambda: self.replied(number) >= wanted, f"device {number} in round {wanted}")

    def says(self, number: int, words: str) -> None:
        self.wait(lambda: words in self.log(number), words)

    def wait(self, condition: Any, what: str) -> None:
        assert self.server is not None
        server = self.server
        with suppress(AssertionError):
            until(lambda: condition() or server.poll() is not None, what)
        logs = [self.log(number)[-2000:] for number in range(len(self.devices))]
        assert server.poll() is None, (what, self.words, logs)
        assert condition(), (what, logs)

    def endure(self, *lanes: Sequence[Fault]) -> None:
        """Have the faults of each lane one after the other, and lanes side by side."""

        def one_by_one(lane: Sequence[Fault]) -> None:
            for fault in lane:
                try:
                    fault(self)
                except BaseException as error:
                    error.add_note(f"fault: {fault}")
                    raise

        with ThreadPoolExecutor(len(lanes)) as pool:
            running = [pool.submit(one_by_one, lane) for lane in lanes]
            errors = [error for lane in running if (error := lane.exception()) is not None]
        if errors:
            raise BaseExceptionGroup("faults that were not survived", errors)

    @contextmanager
    def fault(self, number: int, name: str, words: str) -> Iterator[None]:
        path = self.devices[number].root / "faults" / name
        path.write_text(words)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


Fault = Callable[[Gauntlet], None]


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
            # The server notices that a device is gone after two heartbeats: it is back before.
            one = demo.make_device(
                fleet, name, root, number, meters[number].port,
                heartbeat_s=60.0, wait_s=3.0, timeout_s=4.0,
            )  # fmt: skip
            one = replace(one, server=f"{host}:{meters[number].port}")
            one.save()
            devices.append(one)
        found = Gauntlet(fleet, devices, meters, network, root / "run", stack)
        yield found


@pytest.fixture
def well(gauntlet: Gauntlet) -> Gauntlet:
    """All devices are well."""
    gauntlet.heal()
    return gauntlet


# --- processes -----------------------------------------------------------------------------------


def is_killed(number: int, step: str, gauntlet: Gauntlet) -> None:
    process = gauntlet.running[number]
    with gauntlet.fault(number, "die", step):
        assert process.wait(RUN_S) == -9
    gauntlet.start(number)
    gauntlet.is_back(number)


def trainer_dies(number: int, fault: str, said: str, gauntlet: Gauntlet) -> None:
    with gauntlet.fault(number, fault, "10"):
        gauntlet.says(number, said)
    gauntlet.is_back(number)


DIES = {"oom": "the training process died: SIGKILL, out of memory?", "memory": "MemoryError"}


def test_killed_at_any_step_no_update_is_lost_and_a_trainer_costs_its_own(well: Gauntlet) -> None:
    """Rounds wait for those who are killed: whatever is missing in them, was lost for good."""
    gauntlet = well
    gauntlet.go_on("round_deadline_s=300", f"rounds={ENDLESS}")
    gauntlet.goes_on()
    before = rounds(gauntlet.run)
    lanes: list[list[Fault]] = [[], [], []]
    for place, step in enumerate(STEPS):
        lanes[place % 3].append(partial(is_killed, place % 3, step))
    for number, (fault, said) in zip((0, DISTANT), DIES.items(), strict=True):
        lanes[number].append(partial(trainer_dies, number, fault, said))
    gauntlet.endure(*lanes)
    gauntlet.end()
    reasons = []
    for record in gauntlet.records(before):
        assert record["replies"] + len(record["reasons"]) == 3, record
        reasons += record["reasons"]
    for said in DIES.values():
        assert any(said in reason for reason in reasons), reasons
    assert all(any(said in reason for said in DIES.values()) for reason in reasons), reasons


# --- what a device has ---------------------------------------------------------------------------


def has_an_old_version(gauntlet: Gauntlet) -> None:
    gauntlet.stop(PROXIED)
    with gauntlet.fault(PROXIED, "version", "0.0.9"):
        gauntlet.start(PROXIED)
        gauntlet.says(PROXIED, "this device has fedq 0.0.9, the server")
        gauntlet.goes_on()
        gauntlet.stop(PROXIED)


def has_a_full_disk(gauntlet: Gauntlet) -> None:
    """Without its process until now, it is back first."""
    filler = gauntlet.devices[PROXIED].state / "filler"
    gauntlet.start(PROXIED)
    gauntlet.is_back(PROXIED)
    if not filler.parent.is_mount():
        return
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    gauntlet.says(PROXIED, os.strerror(errno.ENOSPC))
    gauntlet.goes_on()
    filler.unlink()
    gauntlet.is_back(PROXIED)


@contextmanager
def small_disk(gauntlet: Gauntlet) -> Iterator[str]:
    """Give a device that does not run a small disk for its state; or say why it has none."""
    state = gauntlet.devices[PROXIED].state
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(state)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        yield "needs root, to mount a small file system"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


def has_a_wrong_clock(gauntlet: Gauntlet) -> None:
    with gauntlet.fault(PROXIED, "clock", "3600"):
        gauntlet.says(PROXIED, "s ahead of the server's; set it")
        gauntlet.goes_on()
    gauntlet.is_back(PROXIED)


# --- the network ---------------------------------------------------------------------------------


def connections_are_cut(cut_s: float, gauntlet: Gauntlet) -> None:
    said = gauntlet.log(PROXIED).count("connected again")
    gauntlet.meters[PROXIED].cut()
    time.sleep(cut_s)
    gauntlet.meters[PROXIED].mend()
    gauntlet.is_back(PROXIED)
    assert gauntlet.log(PROXIED).count("connected again") > said


def connections_are_half_open(gauntlet: Gauntlet) -> None:
    said = gauntlet.log(PROXIED).count("timed out")
    gauntlet.meters[PROXIED].swallow()
    gauntlet.wait(lambda: gauntlet.log(PROXIED).count("timed out") > said, "half open")
    gauntlet.meters[PROXIED].mend()
    gauntlet.is_back(PROXIED)


def network_is_gone(cut_s: float, gauntlet: Gauntlet) -> None:
    assert gauntlet.network is not None
    gauntlet.network.loss = 1.0
    time.sleep(cut_s)
    gauntlet.network.loss = 0.0
    gauntlet.is_back(DISTANT)


def network_loses_packets(gauntlet: Gauntlet) -> None:
    assert gauntlet.network is not None
    lost = gauntlet.network.lost
    gauntlet.network.loss = 0.3
    try:
        for _ in range(2):
            gauntlet.is_back(DISTANT)
        assert gauntlet.network.lost > lost
    finally:
        gauntlet.network.loss = 0.0


def few_skipped(records: list[dict[str, Any]]) -> bool:
    """Whether faults cost rounds nothing but their own device.

    On a crowded machine now and then no device answers within seconds.
    """
    return sum(record["skipped"] for record in records) <= (0 if FULL else 1 + len(records) // 20)


# --- who is hostile, and who is not let in -------------------------------------------------------


def sends_garbage_for_updates(gauntlet: Gauntlet) -> None:
    before = rounds(gauntlet.run)

    def quarantined() -> bool:
        return any(record["quarantined"] for record in gauntlet.records(before))

    with gauntlet.fault(PROXIED, "garbage", "nonsense" * 1000):
        # Strikes come with rounds that it is asked in and answers in time.
        gauntlet.wait(quarantined, "quarantine")
    gauntlet.is_back(PROXIED)  # after its quarantine
    found = gauntlet.records(before)
    assert any(record["rejected"].get("malformed") for record in found)
    assert few_skipped(found)


def sends_garbage_for_requests(gauntlet: Gauntlet) -> None:
    link = Link(gauntlet.devices[HEALTHY])
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
    gauntlet.goes_on()


class Raw:
    """A request that is no message."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def SerializeToString(self, **options: bool) -> bytes:
        return self._body


def strangers_stay_outside(root: Path, gauntlet: Gauntlet) -> None:
    other = demo.make_fleet(root / "other", 1)
    words = {"ca": "not from this device's fleet", "key": "does not accept"}
    with ExitStack() as stack:
        strangers = {
            name: demo.make_device(other, "device-0", root / name, 0, gauntlet.fleet.port)
            for name in words
        }
        strangers["key"].ca.write_bytes(gauntlet.fleet.path("ca.crt").read_bytes())
        for one in strangers.values():
            stack.enter_context(demo.process(one))
        for name, one in strangers.items():
            log = one.root / "device.log"
            until(lambda log=log, name=name: words[name] in log.read_text(), words[name])
            assert log.read_text().count(words[name]) == 1
            assert "on line" not in log.read_text()


def has_a_rotated_key(gauntlet: Gauntlet) -> None:
    """It is left without a process."""
    fleet, code = enrol(gauntlet.fleet, "device-1")  # the old key does not count any more
    register(fleet)
    gauntlet.says(PROXIED, "does not accept this device's key")
    one = gauntlet.devices[PROXIED]
    gauntlet.stop(PROXIED)
    again = join(fleet.bundle(one.name), code, one.root, {})
    replace(again, server=one.server).save()


def test_faults_of_devices_and_links_and_nothing_that_was_aggregated_is_lost(
    well: Gauntlet, tmp_path: Path
) -> None:
    """Rounds do not wait long for those who are gone."""
    gauntlet = well
    gauntlet.go_on(f"rounds={ENDLESS}")
    gauntlet.goes_on()  # the trainers that the test before has killed start again: seconds
    gauntlet.go_on(f"round_deadline_s={DEADLINE_S:g}", f"rounds={ENDLESS}")
    gauntlet.goes_on()
    proxied: list[Fault] = [
        has_a_full_disk,
        has_a_wrong_clock,
        partial(connections_are_cut, SHORT_CUT_S),
        partial(connections_are_cut, LONG_CUT_S),
        connections_are_half_open,
        sends_garbage_for_updates,
        has_a_rotated_key,
    ]
    distant: list[Fault] = [
        partial(network_is_gone, SHORT_CUT_S),
        partial(network_is_gone, LONG_CUT_S),
        network_loses_packets,
    ]
    healthy: list[Fault] = [sends_garbage_for_requests, partial(strangers_stay_outside, tmp_path)]
    has_an_old_version(gauntlet)
    with small_disk(gauntlet) as no_disk:
        gauntlet.endure(proxied, healthy, [] if gauntlet.network is None else distant)
    gauntlet.start(PROXIED)
    gauntlet.is_back(PROXIED)

    before = gauntlet.records(-1)
    last = before[-1]["round"] + 3
    process = gauntlet.go_on(f"rounds={last}")
    assert process.wait(RUN_S) == 0, gauntlet.words
    assert summary(gauntlet.run)["rounds"] == last
    after = gauntlet.records(-1)
    assert [record["round"] for record in after] == list(range(last + 1))
    assert after[: len(before)] == before
    assert few_skipped(after)
    if missing := [reason for reason in (no_disk, lossy.missing()) if reason]:
        pytest.skip(f"all but what cannot be done here: {'; '.join(missing)}")


def test_an_uplink_of_20_kb_s_delivers_and_has_fewer_bits_once_it_is_known(
    well: Gauntlet, tmp_path: Path
) -> None:
    gauntlet, run, meter = well, tmp_path / "run", well.meters[PROXIED]
    before, meter.up_bytes_s = meter.up_bytes, 20_000.0
    options = ("codec=uniform", "codec.bits=16", "model=small_cnn", "model.width=24")
    adaptive = ("budget=link_aware", "budget.min_bits=12", "budget.max_bits=16")
    widths = ("quantization=mixed", "quantization.widths=[8,4]", "width_by=speed")
    process = gauntlet.train(
        *("--wait", "60", *OPTIONS, *options, *adaptive, *widths, "rounds=3", f"run_dir={run}")
    )
    assert process.wait(RUN_S) == 0, gauntlet.words
    meter.up_bytes_s = 0.0
    found = summary(run)
    assert found["rejected"] == {}
    sent = found["uplink_bytes"] / 3
    assert 0.6 * sent < meter.up_bytes - before < 1.1 * sent + 50_000  # nothing was sent twice
    told = json.loads(fedq("fleet", "status", "--fleet", gauntlet.fleet.root, "--json").stdout)
    speeds = {one["name"]: one["report"]["up_bytes_s"] for one in told["devices"]}
    assert 2_000 < speeds["device-1"] < 30_000 < min(speeds["device-0"], speeds["device-2"])
    last = read_rounds(run)[-1]
    assert last["codecs"] == {"uniform(bits=16)": 2, "uniform(bits=12)": 1}
    assert sum(last["widths"].values()) == 3
