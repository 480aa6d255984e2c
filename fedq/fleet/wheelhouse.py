"""Wheels for devices without a network: the very versions that run here, for another machine.

``pip download --platform`` takes wheels for the platform but evaluates environment markers for the
machine it runs on, and so brings CUDA to a Raspberry Pi. Here the markers are evaluated for the
device, over what is installed, and pip fetches exactly that.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.metadata import parse_email
from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from fedq.errors import ConfigError, FedqError

#: Raspberry Pi OS 64-bit, bookworm and later.
MACHINE, PYTHON = "aarch64", "3.11"
#: PyTorch's own builds for CPUs. PyPI's for ARM are for CUDA, which comes to gigabytes.
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
_GLIBC = (28, 27, 26, 24, 17)
#: Pure Python of which there is no wheel: built here.
SOURCE_ONLY = frozenset({"antlr4-python3-runtime"})
BROKEN = "pip could not download the wheels"


def pinned(machine: str = MACHINE, python: str = PYTHON, packages: Sequence[str] = ()) -> list[str]:
    """Return ``name==version`` of all that fedq, and others, need on a machine, as installed here.

    Local versions, such as ``+cpu``, are of this machine: they are left out.
    """

    def installed(name: str) -> Sequence[str]:
        try:
            return metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            raise FedqError(
                f"{name} is needed on {machine} and not installed here; pip install {name}"
            ) from None

    needs = _requirements(installed, ("fedq", *packages), _environment(machine, python))
    found = {_canonical(needed) for _, needed in needs} | {canonicalize_name(p) for p in packages}
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in sorted(found)]


def unmet(folder: Path, machine: str = MACHINE, python: str = PYTHON) -> list[str]:
    """Return what the wheels of a folder need on a machine and is not among them.

    A version may need there what it does not need here: its wheels are other builds.
    """
    wheels = _read(folder)
    environment = _environment(machine, python)

    def met(needed: Requirement) -> bool:
        name = _canonical(needed)
        return name in wheels and needed.specifier.contains(wheels[name][0], prereleases=True)

    needs = _requirements(
        lambda name: wheels[name][1] if name in wheels else (), wheels, environment
    )
    return [
        f"{name} needs {needed.name}{needed.specifier}" for name, needed in needs if not met(needed)
    ]


def roots(folder: Path) -> list[str]:
    """Return the packages of a wheelhouse that no other one there needs: what it was made for."""
    wheels = _read(folder)
    environment = _environment(MACHINE, PYTHON)
    needed = {
        _canonical(requirement)
        for _, requires in wheels.values()
        for requirement in map(Requirement, requires)
        if _applies(requirement, environment, "")
    }
    return sorted(wheels.keys() - needed)


def _read(folder: Path) -> dict[str, tuple[Version, list[str]]]:
    """Return version and requirements of each package in a folder, of its newest wheel."""
    found = []
    for path in folder.glob("*.whl"):
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
            with zipfile.ZipFile(path) as wheel:
                entry = next(e for e in wheel.namelist() if e.endswith(".dist-info/METADATA"))
                about, _ = parse_email(wheel.read(entry))
        except (InvalidWheelFilename, zipfile.BadZipFile, StopIteration):
            raise FedqError(f"{path} is damaged, or no wheel; remove it") from None
        found.append((version, str(name), about.get("requires_dist", [])))
    return {name: (version, requires) for version, name, requires in sorted(found)}


def _canonical(needed: Requirement) -> str:
    return canonicalize_name(needed.name)


def _environment(machine: str, python: str) -> dict[str, str]:
    return {
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def _applies(needed: Requirement, environment: Mapping[str, str], extra: str) -> bool:
    return needed.marker is None or needed.marker.evaluate({**environment, "extra": extra})


def _requirements(
    requires: Callable[[str], Iterable[str]],
    packages: Iterable[str],
    environment: Mapping[str, str],
) -> Iterator[tuple[str, Requirement]]:
    """Yield all that packages need in an environment, each with the package that needs it."""
    done: set[tuple[str, str]] = set()
    waiting = [(str(canonicalize_name(package)), "") for package in packages]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        for needed in map(Requirement, requires(name)):
            if _applies(needed, environment, extra):
                yield name, needed
                waiting += [(_canonical(needed), other) for other in ("", *needed.extras)]


def make(
    folder: Path,
    fedq_wheel: Path | None,
    machine: str = MACHINE,
    python: str = PYTHON,
    builds: str = CPU_BUILDS,
    packages: Sequence[str] = (),
) -> dict[str, int]:
    """Fill a folder with wheels for a machine and return their sizes in bytes.

    Args:
      folder: Made if it is not there.
      fedq_wheel: fedq's own wheel; without it, one is built from the checkout that runs.
      machine: ``aarch64`` or ``x86_64``.
      python: The device's Python, such as ``3.11``.
      builds: A package index with builds of PyTorch for CPUs.
      packages: Others that the device shall have, as installed here.

    Raises:
      FedqError: If pip cannot fetch them, or they need something that is not among them, as
        PyTorch's builds for CUDA do.
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
    pins = pinned(machine, python, packages)
    source = [pin for pin in pins if pin.partition("==")[0] in SOURCE_ONLY]
    _call([*pip, "wheel", "--quiet", "--no-deps", "-w", str(folder), *source])
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    download = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    download += [word for platform in platforms for word in ("--platform", platform)]
    download += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    torch = [pin for pin in pins if pin.startswith("torch==")]
    _call([*download, "--retries", "1", "--extra-index-url", builds, *torch])
    _call([*download, *(pin for pin in pins if pin not in [*source, *torch])])
    if lacking := unmet(folder, machine, python):
        raise FedqError(
            f"these wheels do not install: {lacking[0]}"
            + (f", and {len(lacking) - 1} more" if lacking[1:] else "")
            + (f"; is {builds} within reach? --torch-index names another" if torch else "")
        )
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise FedqError(f"{BROKEN}: {words[-1] if words else done.stderr.strip()[-300:]}")
