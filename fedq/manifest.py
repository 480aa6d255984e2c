"""``manifest.json`` in a run directory: what one needs to know to repeat the run, or to doubt it.

::

    schema      of this file
    config      all options as they were asked for; ``config_sha256`` over what decides the result
    overrides   what the command line said
    baseline    the float run to compare with, relative to the run directory
    seeds       every seed among the options
    sessions    one per start of the run: time, git state, versions, hardware

It is written before the run, so that an unfinished one has it, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fedq.errors import FedqError
from fedq.results import versions, write_file

MANIFEST = "manifest.json"
SCHEMA = 1
#: Options that say where and how fast a run is, not what it computes.
_ELSEWHERE = {"run_dir", "resume", "baseline", "engine", "decode_threads", "server_memory_gb"}


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 over the options that decide a run's result, 64 hex digits.

    >>> fingerprint({"seed": 1, "run_dir": "a"}) == fingerprint({"run_dir": "b", "seed": 1})
    True
    """
    decisive = {key: value for key, value in config.items() if key not in _ELSEWHERE}
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def decisive(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that decide a run's result.

    >>> decisive(["run_dir=a", "engine.workers=2", "codec.bits=4"])
    ['codec.bits=4']
    """
    return [text for text in overrides if re.split("[.=]", text.lstrip("+~"))[0] not in _ELSEWHERE]


def write(
    path: Path,
    config: Mapping[str, Any],
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    sessions: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a run's manifest.

    Args:
      path: The run directory; made if there is none.
      config: Its options, as :meth:`fedq.experiment.Experiment.to_config` gives them.
      overrides: What the command line said.
      baseline: Path of the float run from ``path``.
      sessions: Starts so far; see :func:`begin`.

    Raises:
      FedqError: If it cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": SCHEMA,
        "overrides": list(overrides),
        "baseline": baseline,
        "seeds": dict(_seeds(config)),
        "config_sha256": fingerprint(config),
        "config": dict(config),
        "sessions": list(sessions),
    }
    write_file(path / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def begin(
    path: Path,
    config: Mapping[str, Any],
    baseline: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Note that a run starts or goes on, now and here; write the manifest if there is none."""
    try:
        found = read(path) or {}
    except FedqError:  # it tells of the run, and must not keep it from going on
        found = {}
    started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    write(
        path,
        found.get("config", config),
        found.get("overrides", overrides),
        found.get("baseline", baseline),
        [*found.get("sessions", ()), started | provenance()],
    )


def read(path: Path) -> dict[str, Any] | None:
    """Return a run's manifest, None if it has none.

    Raises:
      FedqError: If it is damaged, or of a later version of fedq.
    """
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise FedqError(f"{file} is damaged; remove {path} to run it again")
    if content.get("schema") != SCHEMA:
        raise FedqError(
            f"{file} has schema {content.get('schema')}, this version of fedq reads {SCHEMA}"
        )
    return content


@cache
def provenance() -> dict[str, Any]:
    """Return what this process runs with: git state, versions, hardware."""
    return {"git": git_state(), "versions": versions(), "hardware": hardware()}


def git_state() -> dict[str, dict[str, Any] | None]:
    """Return commit and cleanness of fedq's checkout and of the working directory's, if any."""
    checkout = Path(__file__).resolve().parents[1]
    own = _git(checkout) if (checkout / ".git").exists() else None
    return {"fedq": own, "working_directory": _git(Path.cwd())}


def _git(folder: Path) -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
        return done.stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None


def hardware() -> dict[str, Any]:
    """Return processor, cores and memory.

    >>> sorted(hardware())
    ['cores', 'cpu', 'machine', 'memory_gb']
    """
    known = r"^(?:Model|model name|Hardware)\s*:\s*(.*)$"  # Model: what a Raspberry Pi calls itself
    found = re.findall(known, _proc("cpuinfo"), re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+) kB", _proc("meminfo"))
    return {
        "cpu": found[-1] if found else platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory[1]) * 1024 / 1e9, 1) if memory else None,
    }


def _proc(name: str) -> str:
    try:
        return Path("/proc", name).read_text()
    except OSError:  # not Linux
        return ""


def _seeds(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _seeds(value, f"{prefix}{key}.")
        elif key == "seed" or key.endswith("_seed"):
            yield f"{prefix}{key}", value
