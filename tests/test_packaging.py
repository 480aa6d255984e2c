"""What ships: the wheel is for import, Flower's bundle is for running; neither carries tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fedq

REPOSITORY = Path(__file__).parents[1]
BUNDLE_LIMIT_BYTES = 10 << 20
PARTS = ("fedq", "clients", "server", "conf", "tests")
FILES = ("pyproject.toml", "README.md", "LICENSE", ".gitignore")


def files(*folders: str, suffix: str) -> set[str]:
    """The checkout's files below some folders, as a clean clone has them."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for folder in folders
        for path in (REPOSITORY / folder).rglob(f"*{suffix}")
    }


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy under a name that flwr accepts, with the caches of a tree in use."""
    copy = tmp_path_factory.mktemp("packaging") / "fedq"
    copy.mkdir()
    for name in PARTS:
        shutil.copytree(REPOSITORY / name, copy / name)
    for name in FILES:
        shutil.copy(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation")
    run(*build, "--outdir", "../out", cwd=checkout)
    (path,) = (checkout.parent / "out").glob("*.whl")
    return path


def test_the_wheel_is_one_package_with_its_choices(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"fedq-{fedq.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"fedq", info}
    conf = {f"fedq/{name}" for name in files("conf", suffix=".yaml")}
    assert "fedq/conf/config.yaml" in conf
    pages = files("fedq", suffix=".html") | files("fedq", suffix=".css")
    expected = files("fedq", suffix=".py") | conf | pages | {"fedq/py.typed"}
    assert {name for name in names if name.startswith("fedq/")} == expected
    assert any(name.startswith(f"{info}/licenses/") for name in names)


def test_the_bundle_is_what_a_run_needs(checkout: Path) -> None:
    home = checkout.parent / "flwr"
    flwr = Path(sys.executable).with_name("flwr")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    run(flwr, "build", "--app", checkout, cwd=checkout.parent, FLWR_HOME=str(home), **quiet)
    (path,) = checkout.parent.glob("*.fab")
    assert path.stat().st_size < BUNDLE_LIMIT_BYTES
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    code = files("fedq", "clients", "server", suffix=".py") | files("conf", suffix=".yaml")
    assert names - {".info/CONTENT"} == code | {"pyproject.toml"}


def test_version_and_extras_are_consistent() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == fedq.__version__
    packages = " ".join(project["optional-dependencies"]["dev"])
    for needed in ("build", "hatchling", "hypothesis", "mypy", "pip", "pytest", "ruff", "sim-ray"):
        assert needed in packages


@pytest.mark.slow
def test_the_installed_wheel_runs_anywhere(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/*/site-packages")
    # The dependencies are those of this interpreter; the wheel itself comes first.
    dependencies = [path for path in sys.path if "site-packages" in path]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    installer = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*installer, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(python, "-c", "import fedq; print(fedq.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(environment)
    command = environment / "bin" / "fedq"
    assert run(command, "--version", cwd=elsewhere) == f"fedq {fedq.__version__}\n"
    small = ("data=digits", "rounds=1", "clients=4", "clients_per_round=2", "baseline=false")
    run(command, "simulate", *small, "run_dir=run", cwd=elsewhere)
    summary = json.loads((elsewhere / "run" / "summary.json").read_text())
    assert summary["rounds"] == 1
    assert summary["clients"] == 4
