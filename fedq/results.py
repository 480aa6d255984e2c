"""The run directory: what a run writes, in an order that survives a kill at any instruction.

::

    config.yaml         the choices, plain YAML; rewritten only when a run goes on with others
    manifest.json       where the run comes from; see fedq.manifest
    rounds.jsonl        one JSON line per round, flushed and synced
    summary.json        the figures of the finished run; absent while it runs
    model.safetensors   float master weights and the quantizer ranges, of which the deployed int8
                        model is made; the same tensors give the same bytes
    checkpoint/         round-000012.safetensors: all that a resumed run needs
    baseline/           the same federation in float, a run directory
    .lock               held for the life of the run

Every file but ``rounds.jsonl`` is written under a temporary name, synced and renamed, so that a
reader sees the old or the new file, never a part. A line that a kill tore is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import safetensors.numpy
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError

import fedq
from fedq.errors import ConfigError, FedqError

CONFIG, ROUNDS, SUMMARY = "config.yaml", "rounds.jsonl", "summary.json"
#: What a fleet's links carried, by device, where a meter counted.
WIRE = "wire.json"
MODEL, CHECKPOINTS, LOCK = "model.safetensors", "checkpoint", ".lock"
#: Directories of float runs: a run's own, and those that the cells of a sweep share.
BASELINE, BASELINES = "baseline", "baselines"
_KEY = "fedq"  # one metadata key: safetensors keeps no order among several
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``round``: tensors sorted by name and the caller's JSON-ready ``meta``."""

    round: int
    tensors: dict[str, NDArray[Any]]
    meta: dict[str, Any]


class RunDirectory:
    """One run's files, locked against a second writer until :meth:`close` or the process's end.

    Made by :meth:`create` or :meth:`open`; also a context manager. Readers need no lock:
    :func:`read_config`, :func:`read_rounds`, :func:`read_summary`, :func:`read_model`,
    :func:`read_checkpoint`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with RunDirectory.create(folder + "/run", {"seed": 1}) as run:
      ...         run.append_round({"round": 1, "accuracy": 0.5})
      ...         run.save_checkpoint(1, {"x": np.ones(3, np.float32)}, {"layout": "ab12"})
      ...     with RunDirectory.open(folder + "/run") as run:
      ...         run.config, run.rounds(), run.load_checkpoint().meta
      ({'seed': 1}, [{'round': 1, 'accuracy': 0.5}], {'layout': 'ab12'})
    """

    path: Path
    config: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._release = weakref.finalize(self, os.close, _lock(self.path))
        _LOCKED.add(self)

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> Self:
        """Make a run directory, parents too, and write its configuration.

        Raises:
          ConfigError: If the directory cannot be made, is in use or already holds a run.
          FedqError: If the disk is full.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; choose another run_dir")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(path, error) from error
        run = cls(path)
        try:
            if holds_run(path):
                raise ConfigError(
                    f"{path} already holds a run; continue it with 'fedq simulate resume={path}' "
                    "or choose another run_dir"
                )
            run._write_config(config)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a run to continue it; what an interrupted write left behind is cleared.

        Raises:
          ConfigError: If there is no such run or it is in use.
          FedqError: If its files are damaged.
        """
        path = Path(path)
        config = read_config(path)
        run = cls(path)
        try:
            run.config = config
            with _explained(path):
                for stray in [*path.glob(".*.tmp"), *(path / CHECKPOINTS).glob(".*.tmp")]:
                    stray.unlink(missing_ok=True)
                rounds = path / ROUNDS
                written = rounds.read_bytes() if rounds.exists() else b""
            if written and not written.endswith(b"\n"):
                run._rewrite_rounds(run.rounds())
        except BaseException:
            run.close()
            raise
        return run

    def go_on(self, config: Mapping[str, Any]) -> None:
        """Write the configuration that a resumed run goes on with; its old summary is removed.

        A kill from here on leaves a run that is plainly unfinished and knows how far to go.

        Raises:
          FedqError: If it cannot be written; the run is then as it was.
        """
        self._write_config(config)
        with _explained(self.path / SUMMARY):
            (self.path / SUMMARY).unlink(missing_ok=True)
            _sync(self.path)

    def _write_config(self, config: Mapping[str, Any]) -> None:
        plain = _plain(config)
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        write_file(self.path / CONFIG, text.encode())
        self.config = plain

    def close(self) -> None:
        """Release the lock; the files stay."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- rounds ------------------------------------------------------------------------------

    def append_round(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``rounds.jsonl`` and sync it; NaN and infinity become null.

        Raises:
          FedqError: If the line cannot be written; the file then ends as it did before.
        """
        line = (json.dumps(_finite(_plain(record)), allow_nan=False) + "\n").encode()
        with _explained(self.path / ROUNDS):
            fd = os.open(self.path / ROUNDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(fd).st_size
                try:
                    _write_all(fd, line)
                    os.fsync(fd)
                except BaseException:
                    os.ftruncate(fd, size)
                    raise
            finally:
                os.close(fd)

    def rounds(self) -> list[dict[str, Any]]:
        """Return the lines of ``rounds.jsonl``; see :func:`read_rounds`."""
        return read_rounds(self.path)

    def truncate_rounds(self, after: int) -> None:
        """Drop the lines of rounds above ``after``: a kill may fall between line and checkpoint.

        A run that began with another's checkpoint has none.

        Raises:
          FedqError: If the last lines up to ``after`` are missing, or the file cannot be written.
        """
        rounds = self.rounds()
        kept = [record for record in rounds if record["round"] <= after]
        if kept and kept[-1]["round"] < after:
            raise FedqError(
                f"{self.path / ROUNDS} ends with round {kept[-1]['round']}, the checkpoint beside"
                f" it with round {after}: put the missing lines back, or run it again in another"
                " directory"
            )
        if len(kept) < len(rounds):
            self._rewrite_rounds(kept)

    def _rewrite_rounds(self, rounds: Sequence[Mapping[str, Any]]) -> None:
        write_file(self.path / ROUNDS, "".join(json.dumps(r) + "\n" for r in rounds).encode())

    # --- checkpoints -------------------------------------------------------------------------

    def save_checkpoint(
        self, round: int, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        """Write the state after ``round``, then remove the checkpoints before it.

        Args:
          round: The round that is complete, at least 0.
          tensors: Arrays of any shape and of safetensors' dtypes.
          meta: JSON-ready values (keys become text), read back equal, NaN included.

        Raises:
          FedqError: If it cannot be written; the previous checkpoint is then untouched.
        """
        old = _checkpoints(self.path)
        path = self.path / CHECKPOINTS / f"round-{round:06d}.safetensors"
        with _explained(path):
            path.parent.mkdir(exist_ok=True)
        _save(path, tensors, {"round": round, "meta": _plain(meta), "sha256": _digest(tensors)})
        for stale in old:
            if stale != path:
                with contextlib.suppress(OSError):  # the next one removes it
                    stale.unlink()

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return bool(_checkpoints(self.path))

    def load_checkpoint(
        self, *, tensors: Collection[str] = (), meta: Collection[str] = ()
    ) -> Checkpoint:
        """Return the newest usable checkpoint, with a warning if a newer one is not.

        Args:
          tensors: Names of tensors that it must hold.
          meta: Keys that its ``meta`` must have.

        Raises:
          ConfigError: If there is none.
          FedqError: If none is readable and has all that is asked for.
        """
        newest_first = _checkpoints(self.path)[::-1]
        if not newest_first:
            raise ConfigError(f"{self.path} has no checkpoint yet; run it again without resume=")
        damaged: list[FedqError] = []
        for path in newest_first:
            try:
                found = _load_checkpoint(path)
                if absent := [*(set(tensors) - set(found.tensors)), *(set(meta) - set(found.meta))]:
                    raise FedqError(
                        f"{path} lacks {', '.join(sorted(absent))}: another version of fedq wrote "
                        "it, or it is damaged"
                    )
            except FedqError as error:
                damaged.append(error)
                continue
            if damaged:
                message = f"{damaged[0]}; going back to the checkpoint of round {found.round}"
                warnings.warn(message, stacklevel=2)
            return found
        raise FedqError(f"{damaged[0]}, and there is no older checkpoint; start the run again")

    # --- results -----------------------------------------------------------------------------

    def save_model(
        self, tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, Any]
    ) -> str:
        """Write ``model.safetensors`` and return the SHA-256 of the file, 64 hex digits.

        Args:
          tensors: Float master weights and what is averaged beside them: the quantizer ranges of
            which the deployed model is made.
          metadata: JSON-ready values.

        The bytes depend on the tensors and the metadata alone, not on the order of either.
        """
        _save(self.path / MODEL, tensors, metadata)
        return model_digest(self.path)

    def save_read_out(
        self,
        name: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, NDArray[np.float32]],
        metadata: Mapping[str, Any],
    ) -> None:
        """Write ``read_out/NAME/``, which ``fedq export`` takes as it takes a run."""
        folder = self.path / "read_out" / name
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        write_file(folder / CONFIG, text.encode())
        _save(folder / MODEL, tensors, metadata)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, indented, keys sorted; NaN and infinity become null."""
        text = json.dumps(_finite(_plain(summary)), indent=2, sort_keys=True, allow_nan=False)
        write_file(self.path / SUMMARY, (text + "\n").encode())

    def summary(self) -> dict[str, Any] | None:
        """Return ``summary.json``, None before the run's end."""
        return read_summary(self.path)


# --- reading without a lock --------------------------------------------------------------------


def holds_run(path: str | os.PathLike[str]) -> bool:
    """Whether a run has written to this directory."""
    return any((Path(path) / name).exists() for name in (CONFIG, ROUNDS, SUMMARY, MODEL))


def holds_config(path: str | os.PathLike[str]) -> bool:
    """Whether this is a run directory: one with a configuration."""
    return (Path(path) / CONFIG).exists()


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a run's ``config.yaml``.

    Raises:
      ConfigError: If ``path`` is not a run directory.
      FedqError: If the file is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"there is no run directory {path}; give one that 'fedq simulate' wrote")
    if not (path / CONFIG).exists():
        raise ConfigError(f"{path} is not a run directory: it has no {CONFIG}")
    try:
        config = yaml.load(_text(path / CONFIG), _LOADER)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        raise FedqError(f"{path / CONFIG} is damaged: not a YAML mapping; run it again")
    return config


def read_rounds(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of ``rounds.jsonl``, in order; a torn last line is left out.

    Raises:
      FedqError: If a line before the last is damaged.
    """
    path = Path(path) / ROUNDS
    if not path.exists():
        return []
    lines = _text(path).splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("round"), int):
            records.append(record)
        elif number < len(lines):
            raise FedqError(f"{path} is damaged at line {number}; remove that line by hand")
    return records


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return ``summary.json``, None if the run has not ended; FedqError if it is damaged."""
    path = Path(path) / SUMMARY
    if not path.exists():
        return None
    try:
        summary = json.loads(_text(path))
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        raise FedqError(f"{path} is damaged: not a JSON object; remove it or run again")
    return summary


def read_wire(path: str | os.PathLike[str]) -> int | None:
    """Return the bytes that a metered fleet's links carried, from ``wire.json``; None without.

    Counted are all devices and both directions, with TLS and retries.
    """
    path = Path(path) / WIRE
    if not path.exists():
        return None
    try:
        return sum(
            int(one["up_bytes"]) + int(one["down_bytes"])
            for one in json.loads(_text(path)).values()
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FedqError(f"{path} is damaged; remove it or run again") from None


def read_model(
    path: str | os.PathLike[str],
) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Return the tensors of ``model.safetensors``, sorted by name, and its metadata.

    They are the float32 master weights and the quantizer ranges (and batch statistics), of which
    the deployed int8 model is made; not the int8 values themselves.

    Raises:
      ConfigError: If the run has not written its model.
      FedqError: If the file is damaged.
    """
    path = Path(path)
    if not (path / MODEL).is_file():
        raise ConfigError(f"{path} holds no {MODEL}; give a run that has ended")
    return _load(path / MODEL)


def model_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a run's ``model.safetensors``, 64 hex digits."""
    file = Path(path) / MODEL
    with _explained(file), file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return a run's newest checkpoint, as it stands.

    Raises:
      ConfigError: If there is none.
      FedqError: If it is damaged.
    """
    found = _checkpoints(Path(path))
    if not found:
        raise ConfigError(f"{path} holds no checkpoint; give a run directory as it was written")
    return _load_checkpoint(found[-1])


def default_run_path(root: str | os.PathLike[str] = "runs", label: str = "") -> Path:
    """Return a free path named after the local time, e.g. ``runs/2026-11-23_14-05-33``."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S") + (f"_{label}" if label else "")
    path, number = Path(root) / name, 1
    while path.exists():
        number += 1
        path = Path(root) / f"{name}-{number}"
    return path


def versions() -> dict[str, str | int | None]:
    """Return what a figure depends on: package versions, platform, CPUs; imports nothing heavy.

    >>> sorted(versions())
    ['cpus', 'fedq', 'flwr', 'numpy', 'platform', 'python', 'torch']
    """
    found: dict[str, str | int | None] = {}
    for package in ("flwr", "numpy", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {
        "fedq": fedq.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


# --- files -------------------------------------------------------------------------------------

_LOCKED: weakref.WeakSet[RunDirectory] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked worker shares the lock: one that outlives a killed run would keep it from resuming.
    for run in list(_LOCKED):
        run.close()


os.register_at_fork(after_in_child=_close_in_child)


def _lock(path: Path) -> int:
    """Take the directory's lock and return its file descriptor."""
    try:
        fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        _write_all(fd, str(os.getpid()).encode())
    except BlockingIOError:
        pid = os.read(fd, 20).decode(errors="replace") or "unknown"
        os.close(fd)
        raise ConfigError(
            f"run directory {path} is in use by another run (pid {pid}); choose another run_dir"
        ) from None
    except OSError as error:
        os.close(fd)
        raise _unusable(path, error) from error
    return fd


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a directory's lock, as the writer of a run does.

    Raises:
      ConfigError: If another process holds it.
    """
    descriptor = _lock(Path(path))
    try:
        yield
    finally:
        os.close(descriptor)


def _unusable(path: Path, error: OSError) -> FedqError:
    if error.errno in _FULL:
        return FedqError(f"cannot write {path}: {error.strerror}; free some space")
    return ConfigError(f"cannot use {path}: {error.strerror}; choose another run_dir")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a failing read or write of ``path`` into one line."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in _FULL else "check the disk and permissions"
        raise FedqError(f"cannot access {path}: {error.strerror or error}; {remedy}") from error


def _text(path: Path) -> str:
    with _explained(path):
        return path.read_text(encoding="utf-8", errors="replace")


def _checkpoints(path: Path) -> list[Path]:
    return sorted((path / CHECKPOINTS).glob("round-*.safetensors"))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it.

    Raises:
      FedqError: If it cannot be written; what was there before is untouched.
    """

    def write(temporary: Path) -> None:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_all(fd, data)
        finally:
            os.close(fd)

    _replace(path, write)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, and put it in the place of ``path`` when it is safe."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _explained(path):
            write(temporary)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _save(path: Path, tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
    arrays = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    text = json.dumps(_plain(header), sort_keys=True)

    def write(temporary: Path) -> None:
        try:
            safetensors.numpy.save_file(arrays, temporary, {_KEY: text})
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            code = int(found[1]) if found else errno.EIO
            raise OSError(code, os.strerror(code)) from error
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes for the owner alone

    _replace(path, write)


def _load(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    try:
        with _explained(path):
            data = path.read_bytes()
        tensors = safetensors.numpy.load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_KEY])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FedqError):
            raise
        raise FedqError(f"{path} is damaged ({str(error) or type(error).__name__})") from error
    return {name: tensors[name].copy() for name in sorted(tensors)}, header


def _load_checkpoint(path: Path) -> Checkpoint:
    tensors, header = _load(path)
    if not isinstance(header, dict) or header.get("sha256") != _digest(tensors):
        raise FedqError(f"{path} is damaged (its checksum does not match)")
    server_round, meta = header.get("round"), header.get("meta")
    if not isinstance(server_round, int) or not isinstance(meta, dict):
        raise FedqError(f"{path} is damaged (it names no round)")
    return Checkpoint(server_round, tensors, meta)


def _digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# --- values ------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return ``value`` with mappings, sequences and NumPy values as plain Python ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value


def to_json(value: Any) -> str:
    r"""Return JSON of a value of mappings, sequences, NumPy values and plain ones, indented.

    NaN and infinity, which JSON has not, become null.

    >>> to_json({"mean": np.float32("nan")})
    '{\n  "mean": null\n}'
    """
    return json.dumps(_finite(_plain(value)), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return a plain value with NaN and infinity, which JSON has not, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
