"""Wheels for devices without a network: the very versions that run here, for another machine.

``pip download --platform`` takes wheels for the platform but evaluates environment markers for the
machine it runs on, and so brings CUDA to a Raspberry Pi. Here the markers are evaluated for the
device, over what is installed, and pip fetches exactly that.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedq.errors import ConfigError, FedqError

#: Raspberry Pi OS 64-bit, bookworm and later.
MACHINE, PYTHON = "aarch64", "3.11"
_GLIBC = (28, 27, 26, 24, 17)
#: Pure Python of which there is no wheel: built here.
SOURCE_ONLY = frozenset({"antlr4-python3-runtime"})
BROKEN = "pip could not download the wheels"


def pinned(machine: str = MACHINE, python: str = PYTHON) -> list[str]:
    """Return ``name==version`` of all that fedq needs on a machine, as installed here.

    Local versions, such as ``+cpu``, are of this machine: they are left out.
    """
    names = sorted(_needed(machine, python))
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def _needed(machine: str, python: str) -> Iterator[str]:
    environment = {
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    done: set[tuple[str, str]] = set()
    listed: set[str] = set()
    waiting = [("fedq", "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            raise FedqError(
                f"{name} is needed on {machine} and not installed here; pip install {name}"
            ) from None
        if name != "fedq" and name not in listed:
            listed.add(name)
            yield name
        for text in requires:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({**environment, "extra": extra}):
                canonical = str(canonicalize_name(needed.name))
                waiting += [(canonical, other) for other in ("", *needed.extras)]


def make(
    folder: Path, fedq_wheel: Path | None, machine: str = MACHINE, python: str = PYTHON
) -> dict[str, int]:
    """Fill a folder with wheels for a machine and return their sizes in bytes.

    Args:
      folder: Made if it is not there.
      fedq_wheel: fedq's own wheel; without it, one is built from the checkout that runs.
      machine: ``aarch64`` or ``x86_64``.
      python: The device's Python, such as ``3.11``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if fedq_wheel is None:
        checkout = Path(__file__).resolve().parents[2]
        if not (checkout / "pyproject.toml").is_file():
            raise ConfigError("fedq runs from a wheel here; give it with --fedq-wheel FILE")
        _call([*pip, "wheel", "--quiet", "--no-deps", "-w", str(folder), str(checkout)])
    else:
        (folder / fedq_wheel.name).write_bytes(fedq_wheel.read_bytes())
    pins = pinned(machine, python)
    source = [pin for pin in pins if pin.partition("==")[0] in SOURCE_ONLY]
    _call([*pip, "wheel", "--quiet", "--no-deps", "-w", str(folder), *source])
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    _call(
        [
            *(*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *(word for platform in platforms for word in ("--platform", platform)),
            *("--python-version", python, "--implementation", "cp", "--dest", str(folder)),
            *(pin for pin in pins if pin not in source),
        ]
    )
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise FedqError(f"{BROKEN}: {words[-1] if words else done.stderr.strip()[-300:]}")
