"""The doctor never raises, finds what is broken and says what to do about it."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedq import cli, doctor
from fedq.doctor import Check

CORE = {"cryptography", "flwr", "hydra-core", "numba", "numpy", "safetensors", "torch"}


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda names: [])


def by_name(checks: list[Check]) -> dict[str, Check]:
    found = {item.name: item for item in checks}
    assert len(found) == len(checks)
    return found


def raises(*args: object, **options: object) -> Any:
    raise OSError(5, "broken\nhard")


def fake_package(folder: Path, name: str, code: str, version: str = "1.0") -> None:
    """Write an installed-looking package whose import runs ``code``."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_machine_passes_without_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A child process that connects anywhere dies, and its probe fails.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket\n"
        "def connect(*args):\n    os._exit(77)\n"
        "class Socket(socket.socket):\n    connect = connect_ex = sendto = connect\n"
        "socket.socket = Socket\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "root").mkdir()
    checks = doctor.check(tmp_path / "root" / "runs")
    assert [item for item in checks if item.status == "fail"] == []
    assert CORE | {"python", "memory", "run directory", "MNIST-5k", "ray"} <= by_name(checks).keys()
    assert os.listdir(tmp_path / "root") == []
    assert [Check(**item) for item in json.loads(doctor.to_json(checks))] == checks


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (doctor.os, "getloadavg"),
        (doctor.shutil, "disk_usage"),
        (doctor.tempfile, "mkdtemp"),
        (doctor.platform, "platform"),
        (doctor, "memory_bytes"),
        (doctor.gzip, "open"),
        (doctor.util, "find_spec"),
        (doctor.metadata, "version"),
        (doctor.time, "strftime"),
    ],
)
@pytest.mark.usefixtures("no_probes")
def test_what_breaks_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str
) -> None:
    monkeypatch.setattr(owner, attribute, raises)
    failed = [item for item in doctor.check(tmp_path) if item.status == "fail"]
    assert failed
    for item in failed:
        assert "broken" in item.detail
        assert "\n" not in item.detail
        assert item.remedy


@pytest.mark.usefixtures("no_probes")
@pytest.mark.parametrize("where", ["file", "file/below"])
def test_run_directory_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    found = by_name(doctor.check(tmp_path / where))["run directory"]
    assert found.status == "fail"
    assert "choose a run_dir" in found.remedy


@pytest.mark.parametrize(
    ("free", "status"), [(10**8, "fail"), (5 * 10**8, "warn"), (4 * 10**9, "ok")]
)
def test_memory(monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (8 * 10**9, free))
    found = doctor._memory()
    assert found.status == status
    assert bool(found.remedy) == (status != "ok")


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    found = doctor._disk(tmp_path / "not" / "yet")
    assert (found.status, found.remedy) == (
        "fail",
        "free some space, or choose another run_dir",
    )


def test_clock_that_was_never_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 3600.0)
    found = doctor._clock()
    assert found.status == "fail"
    assert "1970-01-01" in found.detail
    assert "timedatectl" in found.remedy


def test_32_bit_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "maxsize", 2**31 - 1)
    assert "64-bit" in doctor._python().remedy
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")
    assert "WSL" in doctor._system().remedy
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "armv7l")
    assert doctor._system().status == "warn"


# --- packages ------------------------------------------------------------------------------------


def test_packages_are_those_of_the_metadata() -> None:
    wanted = doctor._requirements()
    assert {doctor._short(requirement) for requirement in wanted} >= CORE
    assert any(requirement.startswith("flwr") and "1.41" in requirement for requirement in wanted)


def test_missing_and_outdated_packages() -> None:
    missing = doctor._package("fedq-no-such-package>=2")
    assert missing.detail == "is not installed"
    assert missing.remedy == "pip install 'fedq-no-such-package>=2'"
    old = doctor._package("numpy>=999")
    assert (old.status, old.remedy) == ("fail", "pip install 'numpy>=999'")
    assert "fedq needs >=999" in old.detail
    assert doctor._package("numpy>=2.0").status == "ok"


def test_a_crashing_package_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    fake_package(tmp_path, "fedqcrash", crash)
    fake_package(tmp_path, "fedqexit", "import os\nos._exit(3)\n")
    fake_package(tmp_path, "fedqraise", "raise ImportError('libfoo.so is missing')\n")
    fake_package(tmp_path, "fedqfine", "print('noise')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["processes", "fedqcrash", "fedqexit>=1", "fedqraise", "fedqfine"]
    found = doctor._probe(names)
    assert [item.name for item in found] == [name.split(">")[0] for name in names]
    assert [item.status for item in found] == ["ok", "fail", "fail", "fail", "ok"]
    assert "SIGILL" in found[1].detail
    assert "fedqcrash for this processor" in found[1].remedy
    assert "status 3" in found[2].detail
    assert "libfoo.so" in found[3].detail
    assert "--force-reinstall" in found[3].remedy


def test_a_hanging_package_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "fedqhang", "import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    (found,) = doctor._probe(["fedqhang"])
    assert found.status == "fail"
    assert "did not answer" in found.detail


def test_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "executable", "/nowhere/python")
    (found,) = doctor._probe(["numpy"])
    assert "cannot start /nowhere/python" in found.detail


def test_numba_without_a_cache_or_with_wrong_results() -> None:
    def njit(cache: bool) -> Any:
        raise RuntimeError("cannot cache function: no locator available")

    found = doctor._numba(SimpleNamespace(njit=njit), "1.0")
    assert (found.status, "NUMBA_CACHE_DIR" in found.remedy) == ("fail", True)
    wrong = SimpleNamespace(njit=lambda cache: lambda function: lambda x: x)
    assert "computes wrongly" in doctor._numba(wrong, "1.0").detail


# --- output --------------------------------------------------------------------------------------


def test_render_shows_every_remedy() -> None:
    checks = [
        Check("clock", "ok", "2026"),
        Check("disk", "warn", "0.4 GB [free]", "free some space"),
        Check("flwr", "fail", "is not installed", "pip install 'flwr>=1.41,<1.42'"),
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(doctor.render(checks))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for item in checks:
        for part in (item.name, item.status, item.detail, item.remedy):
            assert part in text
    assert "\x1b" not in text


def test_compile_warms_the_kernels_up_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr("fedq.jit.warm_up", lambda: done.append("kernels"))
    monkeypatch.setattr("fedq.doctor.check", lambda: done.append("checks") or [])
    assert cli.main(["doctor", "--compile", "--json"]) == 0
    assert done == ["kernels", "checks"]
    capsys.readouterr()
