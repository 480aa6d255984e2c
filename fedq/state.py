"""What a device keeps between rounds, on disk: atomic, keyed by client and round.

::

    residual/<client>/000012.f32    what error feedback owes after round 12, (d,) little-endian
    local/<client>/000012.f32       what the client alone trains, as it was after round 12
    model/000012.f32                the global model received in round 12
    secret/<client>                 keys of a round of secure aggregation under way; owner only
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedq.errors import FedqError
from fedq.layout import Layout, Vector

LOG = logging.getLogger("fedq")

#: Files kept of a kind: the newest may belong to a round that the server never finished.
KEPT = 2


@dataclass(frozen=True)
class StateStore:
    """Residuals of error feedback and received models, one file per round.

    A run that resumes at round r must see the residual that the client had before round r, even if
    the client already trained in round r before the kill: files carry their round, the reader takes
    the newest one below, and a writer replaces nothing.

    Args:
      directory: Made when something is kept.
      models: Received models to keep. Simulated clients share a directory, and with it the model of
        a round, which is the same for all of them.
    """

    directory: Path
    models: int = KEPT

    def residual(self, client: int, before_round: int, layout: Layout) -> Vector:
        """Return a client's residual from its last round before this one, or zeros.

        A file that is damaged, or of another layout, is passed over with a warning.
        """
        found = self._newest("residual", client, before_round, layout)
        return np.zeros(layout.size, np.float32) if found is None else found

    def keep_residual(self, client: int, server_round: int, residual: Vector) -> None:
        """Write a client's residual of a round and drop older ones."""
        self._keep(self._own("residual", client), server_round, residual, KEPT)

    def local(self, client: int, before_round: int, layout: Layout) -> Vector | None:
        """Return what a client kept of its own before this round, None in its first."""
        return self._newest("local", client, before_round, layout)

    def keep_local(self, client: int, server_round: int, values: Vector) -> None:
        """Write what a client alone trains, and drop older ones."""
        self._keep(self._own("local", client), server_round, values, KEPT)

    def model(self, server_round: int, layout: Layout) -> Vector | None:
        """Return the global model received in a round, None if it is not here (any more)."""
        return _read(_path(self._models, server_round), layout)

    def keep_model(self, server_round: int, weights: Vector) -> None:
        """Write a received global model and drop older ones."""
        if not _path(self._models, server_round).exists():
            self._keep(self._models, server_round, weights, self.models)

    def _newest(self, kind: str, client: int, before_round: int, layout: Layout) -> Vector | None:
        for server_round, path in _by_round(self._own(kind, client)):
            if server_round < before_round and (values := _read(path, layout)) is not None:
                return values
        return None

    def _own(self, kind: str, client: int) -> Path:
        # A folder per client: to list one for thousands of them would cost more than the training.
        return self.directory / kind / str(client)

    def secrets(self, client: int) -> bytes | None:
        """Return what :meth:`keep_secrets` kept for a client."""
        path = self._secrets / str(client)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FedqError(f"cannot read the client state {path}: {error}") from error

    def keep_secrets(self, client: int, data: bytes) -> None:
        """Replace a client's secrets; nobody but the owner may read them."""
        path = self._secrets / str(client)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._secrets.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise FedqError(f"cannot keep client state in {self.directory}: {error}") from error

    @property
    def _secrets(self) -> Path:
        return self.directory / "secret"

    @property
    def _models(self) -> Path:
        return self.directory / "model"

    def _keep(self, folder: Path, server_round: int, values: Vector, kept: int) -> None:
        path = _path(folder, server_round)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                values.astype("<f4", copy=False).tofile(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            for _, old in _by_round(folder)[kept:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            with contextlib.suppress(OSError):  # half a file is room on a full disk
                temporary.unlink(missing_ok=True)
            raise FedqError(f"cannot keep client state in {self.directory}: {error}") from error


def _path(folder: Path, server_round: int) -> Path:
    return folder / f"{server_round:06d}.f32"


def _by_round(folder: Path) -> list[tuple[int, Path]]:
    """Return a folder's files and their rounds, the newest first."""
    found = (path for path in folder.glob("*.f32") if path.stem.isdecimal())
    return sorted(((int(path.stem), path) for path in found), reverse=True)


def _read(path: Path, layout: Layout) -> Vector | None:
    """Return a file's (d,) finite float32; None if it is absent, with a warning if damaged."""
    try:
        values = np.fromfile(path, "<f4")
        whole = path.stat().st_size == 4 * layout.size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FedqError(f"cannot read the client state {path}: {error}") from error
    if not whole or not np.isfinite(values).all():
        LOG.warning("%s is not a state of this model, or damaged; it is not used", path)
        return None
    return values.astype(np.float32, copy=False)
