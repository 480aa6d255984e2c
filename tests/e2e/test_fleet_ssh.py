"""A device that is reached over ssh: a real sshd on loopback, whose sessions have another HOME."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedq.cli import main
from fedq.errors import FedqError
from fedq.fleet import demo, device
from fedq.fleet.files import Device, Fleet
from tests.e2e.test_fleet import until

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None, reason="needs openssh-server"),
]
Command = Callable[..., tuple[int, dict[str, Any], str]]

_SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {root}/host
AuthorizedKeysFile {root}/user.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
ForceCommand env -i HOME={home} PATH={home}/bin:/usr/bin:/bin sh -c "$SSH_ORIGINAL_COMMAND"
"""
_SSH = """\
Host pi-1
  HostName 127.0.0.1
  Port {port}
  IdentityFile {root}/user
  IdentitiesOnly yes
  UserKnownHostsFile {root}/known
  StrictHostKeyChecking yes
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The home of pi-1's user; ``ssh pi-1`` reaches it with the user's own key."""
    root, bin_, (port,) = tmp_path / "ssh", tmp_path / "bin", demo.free_ports(1)
    home = tmp_path / "home"
    for path in (root, bin_, home / "bin"):
        path.mkdir(parents=True)
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)]
        subprocess.run(command, check=True)
    key = (root / "host.pub").read_text().split()[:2]
    (root / "known").write_text(f"[127.0.0.1]:{port} {' '.join(key)}\n")
    (root / "sshd_config").write_text(_SSHD.format(port=port, root=root, home=home))
    (root / "config").write_text(_SSH.format(port=port, root=root))
    for path, words in (
        (bin_ / "ssh", f'exec {shutil.which("ssh")} -F {root}/config "$@"'),
        (
            home / "bin" / "fedq",
            f'PYTHONPATH={os.pathsep.join(sys.path)} exec {sys.executable} -m fedq.cli "$@"',
        ),
    ):
        path.write_text(f"#!/bin/sh\n{words}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    if os.geteuid() == 0:  # where sshd separates its privileges
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = root / "sshd.log"
    assert SSHD is not None
    command = [SSHD, "-D", "-e", "-f", str(root / "sshd_config")]
    with log.open("wb") as file:
        server = subprocess.Popen(command, stderr=file, stdin=subprocess.DEVNULL)
    try:
        until(lambda: "listening" in log.read_text() or server.poll() is not None, "sshd")
        assert server.poll() is None, log.read_text()
        yield home
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``fedq fleet ... --json``: status, what was told, the error."""

    def call(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        code = main(["fleet", *map(str, arguments), "--json"])
        told = capsys.readouterr()
        return code, json.loads(told.out or "{}"), told.err

    return call


def wheel(folder: Path, version: str) -> None:
    """Write a wheel of a small package called fedq."""
    folder.mkdir()
    about = f"fedq-{version}.dist-info"
    files = {
        "fedq.py": f"__version__ = {version!r}\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: fedq\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / f"fedq-{version}-py3-none-any.whl", "w") as archive:
        for name, text in {**files, f"{about}/RECORD": record}.items():
            archive.writestr(name, text)


def test_a_device_is_enrolled_upgraded_and_removed_over_ssh(
    home: Path, command: Command, tmp_path: Path
) -> None:
    port, control_port = demo.free_ports(2)
    at = ("--fleet", tmp_path / "fleet")
    ports = ("--port", str(port), "--control-port", str(control_port))
    code, _, error = command("init", *at, "--server", "127.0.0.1", "--listen", "127.0.0.1", *ports)
    assert code == 0, error
    fleet = Fleet.open(tmp_path / "fleet")
    node = ("--node", "data=npz", "--node", "data-path=/own data.npz")
    with ExitStack() as stack:
        stack.enter_context(demo.up(fleet))
        code, told, error = command("enroll", *at, "pi-1", *node, "--no-service")
        assert code == 0, error
        said = f"127.0.0.1:{port} accepts pi-1\ndata: /own data.npz does not exist"
        assert (told["device"], told["runs"]) == ("pi-1", "none")
        assert told["said"].startswith(said)
        one = Device.open(home / ".fedq" / "device")
        assert one.node == {"data": "npz", "data-path": "/own data.npz"}
        assert stat.S_IMODE(one.key.stat().st_mode) == 0o600
        assert not list(home.glob(".fedq/*.tar"))
        private = one.key.read_bytes().split(b"\n")[2]
        code, told, error = command("logs", *at, "-n", "10000")
        assert code == 0, error
        assert private.decode() not in "".join(told["lines"])

        # Software comes with the connection, and pip reaches nothing else.
        wheel(tmp_path / "wheels", "0.0.7")
        code, told, error = command("upgrade", *at, "pi-1", "--wheels", tmp_path / "wheels")
        assert (code, told) == (0, {"upgraded": ["pi-1"], "failed": {}}), (told, error)
        python = home / ".fedq" / "venv" / "bin" / "python"
        script = [python, "-c", "import fedq; print(fedq.__version__)"]
        done = subprocess.run(script, cwd="/", env={}, capture_output=True, text=True, check=True)
        assert done.stdout == "0.0.7\n"

        assert device.check(one)
        code, told, error = command("remove", *at, "pi-1")
        assert (code, told) == (0, {"devices": []}), error
        with pytest.raises(FedqError, match="does not accept this device's key"):
            device.check(one)


def test_what_ssh_says_is_one_line(home: Path, command: Command, tmp_path: Path) -> None:
    at = ("--fleet", tmp_path / "fleet")
    assert command("init", *at, "--server", "127.0.0.1", "pi-1", "pi-2")[0] == 0
    (home / "bin" / "fedq").unlink()
    wheel(tmp_path / "wheels", "0.0.7")
    wheels = ("--wheels", tmp_path / "wheels")
    for arguments, status, words in (
        (("enroll", *at, "pi-1"), 1, "fedq is not installed there; give --wheels DIR"),
        (("enroll", *at, "pi-1", "--ssh", "nobody@pi-1"), 1, "Permission denied"),
        (("logs", *at, "pi-1"), 1, "no log there"),
        (("logs", *at, "pi-9"), 2, "no device 'pi-9'"),
        (("logs", *at, "--ssh", "pi-1"), 2, "fedq fleet logs DEVICE --ssh HOST"),
        (("upgrade", *at, "pi-1", "pi-2", "--ssh", "pi-1", *wheels), 2, "one device's host"),
    ):
        code, _, error = command(*arguments)
        assert code == status, (arguments, error)
        assert words in error
        assert error.count("\n") == 1, error
    code, told, _ = command("upgrade", *at, "pi-2", *wheels)
    assert code == 1
    assert told["upgraded"] == []
    assert "pi-2" in told["failed"]["pi-2"]
