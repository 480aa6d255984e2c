"""A fleet of real processes: a SuperLink, SuperNodes with keys of their own, masks and seals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedq.keys import Fleet, make_device
from tests.e2e.test_flower import bundle, flower, processes_with, summary

DEVICES, START_S, RUN_S = 3, 120, 900


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink and three SuperNodes on the loopback; the environment to reach them."""
    fleet, port = Fleet.init(tmp_path / "fleet"), free_port()
    for client in range(DEVICES):
        fleet.add(client, make_device(tmp_path / f"device{client}"))
    for client in range(DEVICES):
        shutil.copytree(
            tmp_path / "fleet" / "public", tmp_path / f"device{client}", dirs_exist_ok=True
        )
    marker = f"FEDQ_TEST_FLEET={tmp_path}"
    common = {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        "FEDQ_TEST_FLEET": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        home = tmp_path / f"home-{name}"  # apps are unpacked there: one for each process
        home.mkdir()
        with (tmp_path / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                env={**common, "FLWR_HOME": str(home)},
                cwd=tmp_path,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    address = f"127.0.0.1:{port}"
    processes = [start("link", flower("flower-superlink"), "--insecure", "--port", str(port))]
    try:
        wait_for(f"http://{address}/health", processes[0], tmp_path / "link.log")
        for client in range(DEVICES):
            own = tmp_path / f"device{client}"
            config = f'data="digits" partition-id={client} keys="{own}" state-dir="{own / "state"}"'
            processes.append(
                start(
                    f"node{client}", flower("flower-supernode"), "--insecure",
                    "--superlink", address, "--port", str(free_port()), "--node-config", config,
                )
            )  # fmt: skip
        home = tmp_path / "home-user"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "{address}"\n'
            "insecure = true\n"
        )
        yield {**common, "FLWR_HOME": str(home)}
    finally:
        for process in processes:
            process.terminate()
        while left := processes_with(marker):
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=1).close()
            return
        time.sleep(0.2)
    pytest.fail("no SuperLink: " + log.read_text())


@pytest.mark.slow
def test_masks_and_seals_between_processes(federation: dict[str, str], tmp_path: Path) -> None:
    app, run = bundle(tmp_path), tmp_path / "run"
    end, logs = time.monotonic() + START_S, [tmp_path / f"node{i}.log" for i in range(DEVICES)]
    while not all("SuperNode ID" in log.read_text() for log in logs):  # said once it is on line
        assert time.monotonic() < end, logs[0].read_text()
        time.sleep(0.1)
    options = (
        "data=digits clients_per_round=3 rounds=1 local_epochs=1 baseline=false sealed=true "
        f"secure_aggregation=secagg keys={tmp_path / 'fleet' / 'server'} run_dir={run}"
    )
    done = subprocess.run(
        [flower("flwr"), "run", ".", "test", "--stream", "--run-config", f'hydra="{options}"'],
        cwd=app,
        env=federation,
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_S,
    )
    assert (run / "summary.json").exists(), done.stdout + done.stderr
    found = summary(run)
    assert (found["rounds"], found["updates"], found["rejected"]) == (1, DEVICES, {})
    for client in range(DEVICES):
        secret = list((tmp_path / f"device{client}" / "state").glob(f"*/secret/{client}"))
        assert [json.loads(path.read_bytes())["session"] for path in secret] == [None]
