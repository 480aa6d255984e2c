"""Reaching devices over ssh: install, enrol, upgrade, and what their services said.

All that happens on a device is a shell script run by :data:`Transport`, one function; a test runs
it here.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fedq.errors import ConfigError, FedqError
from fedq.fleet.bundle import enrol
from fedq.fleet.files import Fleet
from fedq.fleet.wheelhouse import roots

#: Runs a shell script on a device with bytes as its input, and returns its output.
Transport = Callable[[str, bytes], bytes]
TIMEOUT_S = 3600.0

_HOME = 'set -eu; umask 077; root="$HOME/.fedq"; mkdir -p "$root"'
_FEDQ = (
    'fedq="$root/venv/bin/fedq"; [ -x "$fedq" ] || fedq=$(command -v fedq) || '
    '{ echo "fedq is not installed there; give --wheels DIR" >&2; exit 3; }'
)
_INSTALL = """
tar -xf - -C "$root"
[ -x "$root/venv/bin/python" ] || python3 -m venv "$root/venv"
"$root/venv/bin/python" -m pip install --quiet --no-index --find-links "$root/wheels" \\
    --upgrade {packages}
rm -rf "$root/wheels"
"""
_SERVICE = """
if command -v systemctl >/dev/null && sudo -n true 2>/dev/null; then
    sudo -n install -m 644 "$root/device/fedq-node.service" /etc/systemd/system/
    sudo -n sed -i "/^\\[Service\\]/a User=$(id -un)" /etc/systemd/system/fedq-node.service
    sudo -n systemctl daemon-reload
    sudo -n systemctl enable fedq-node
    sudo -n systemctl restart fedq-node
    echo service
else
    echo none
fi
"""


def over_ssh(host: str) -> Transport:
    """Return the transport to a host, with the user's own keys and configuration of ssh."""
    if host.startswith("-"):
        raise ConfigError(f"'{host}' is no host")

    def run(script: str, data: bytes) -> bytes:
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "--", host]
        try:
            done = subprocess.run(
                [*command, f"sh -c {shlex.quote(script)}"],
                input=data,
                capture_output=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError:
            raise FedqError("ssh is not installed here") from None
        except subprocess.TimeoutExpired:
            raise FedqError(f"{host} did not finish within {TIMEOUT_S:.0f} s") from None
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            raise FedqError(f"{host}: {words[-1] if words else f'status {done.returncode}'}")
        return done.stdout

    return run


def enroll(
    fleet: Fleet,
    name: str,
    transport: Transport,
    *,
    node: Sequence[str] = (),
    wheels: Path | None = None,
) -> Fleet:
    """Make a device part of the fleet: software, a new key, its data's place.

    Args:
      fleet: Gets the device, or the device's new key.
      name: The device.
      transport: To the device.
      node: ``KEY=VALUE`` of its data, as for ``fedq fleet join``.
      wheels: A wheelhouse to install from; without one, fedq is there already.
    """
    if wheels is not None:
        install(transport, wheels)
    fleet, code = enrol(fleet, name)
    archive = f'"$root/{name}.tar"'
    transport(f"{_HOME}; cat > {archive}", fleet.bundle(name).read_bytes())
    options = " ".join(f"--node {shlex.quote(text)}" for text in node)
    transport(
        f'{_HOME}; {_FEDQ}; "$fedq" fleet join {archive} --into "$root/device" {options};'
        f" rm {archive}",
        code.encode() + b"\n",
    )
    return fleet


def serve(transport: Transport) -> str:
    """Have systemd start a device, where that is possible; return ``service``, or ``none``."""
    return transport(f"{_HOME}\n{_SERVICE}", b"").strip().decode()


def install(transport: Transport, wheels: Path) -> None:
    """Install a wheelhouse on a device: fedq and what else it was made for.

    Nothing else is reached from there.
    """
    files, packages = sorted(wheels.glob("*.whl")), roots(wheels)
    if "fedq" not in packages:
        raise FedqError(f"no wheel of fedq in {wheels}; make one with fedq fleet wheelhouse")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in files:
            archive.add(path, f"wheels/{path.name}")
    script = _INSTALL.replace("{packages}", shlex.join(packages))
    transport(f"{_HOME}\n{script}", buffer.getvalue())


def upgrade(transport: Transport, wheels: Path) -> str:
    """Install newer software on a device and restart its service; return how it runs."""
    install(transport, wheels)
    return serve(transport)


def log(transport: Transport, lines: int) -> list[str]:
    """Return the last lines that a device's service wrote.

    Raises:
      FedqError: If the device keeps no journal of it.
    """
    script = f"journalctl --quiet --no-pager --output cat --unit fedq-node --lines {lines:d}"
    # A system's journal is its administrators'.
    script = f'said=$({script}); [ -n "$said" ] || said=$(sudo -n {script}) || :; printf %s "$said"'
    said = transport(script, b"").decode(errors="replace").splitlines()
    if not said:
        raise FedqError("no log there; if fedq fleet node is no service, look where it was started")
    return said


def accepted(transport: Transport) -> str:
    """Return what a device says when it tries its server.

    Raises:
      FedqError: With the reason, if the server does not accept it.
    """
    return (
        transport(f'{_HOME}; {_FEDQ}; "$fedq" fleet node "$root/device" --check', b"")
        .decode(errors="replace")
        .strip()
    )
