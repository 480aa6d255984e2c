"""What a device keeps between rounds, on disk: atomic, keyed by client and round."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedq.errors import FedqError
from fedq.layout import Layout, Vector

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
        """Return a client's residual from its last round before this one, or zeros."""
        for server_round, path in self._files(f"residual-{client}"):
            if server_round < before_round:
                values = _read(path, layout)
                return np.zeros(layout.size, np.float32) if values is None else values
        return np.zeros(layout.size, np.float32)

    def keep_residual(self, client: int, server_round: int, residual: Vector) -> None:
        """Write a client's residual of a round and drop older ones."""
        self._keep(f"residual-{client}", server_round, residual, KEPT)

    def model(self, server_round: int, layout: Layout) -> Vector | None:
        """Return the global model received in a round, None if it is not here any more."""
        return _read(self._path("model", server_round), layout)

    def keep_model(self, server_round: int, weights: Vector) -> None:
        """Write a received global model and drop older ones."""
        if not self._path("model", server_round).exists():
            self._keep("model", server_round, weights, self.models)

    def _path(self, kind: str, server_round: int) -> Path:
        return self.directory / f"{kind}-{server_round:06d}.f32"

    def _keep(self, kind: str, server_round: int, values: Vector, kept: int) -> None:
        path = self._path(kind, server_round)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                values.astype("<f4", copy=False).tofile(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            for _, old in self._files(kind)[kept:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise FedqError(f"cannot keep client state in {self.directory}: {error}") from error

    def _files(self, kind: str) -> list[tuple[int, Path]]:
        found = self.directory.glob(f"{kind}-*.f32")
        return sorted(((int(p.stem.rsplit("-", 1)[1]), p) for p in found), reverse=True)


def _read(path: Path, layout: Layout) -> Vector | None:
    """Return a file's (d,) float32; None if it is absent or not such a vector."""
    try:
        values = np.fromfile(path, "<f4")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FedqError(f"cannot read the client state {path}: {error}") from error
    if values.shape != (layout.size,) or not np.isfinite(values).all():
        return None
    return values.astype(np.float32, copy=False)
