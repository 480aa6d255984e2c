"""What a device keeps between rounds, on disk: atomic, keyed by client and round."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedq.errors import FedqError
from fedq.layout import Layout, Vector

#: Residuals kept per client: the newest may belong to a round that the server never finished.
KEPT = 2


@dataclass(frozen=True)
class StateStore:
    """Residuals of error feedback, one file per client and round.

    A run that resumes at round r must see the residual that the client had before round r, even if
    the client already trained in round r before the kill: files carry their round, the reader takes
    the newest one below, and a writer replaces nothing.
    """

    directory: Path

    def residual(self, client: int, before_round: int, layout: Layout) -> Vector:
        """Return a client's residual from its last round before this one, or zeros."""
        for server_round, path in self._files(client):
            if server_round < before_round:
                try:
                    values = np.fromfile(path, "<f4")
                except OSError as error:
                    raise FedqError(f"cannot read the client state {path}: {error}") from error
                if values.shape == (layout.size,) and np.isfinite(values).all():
                    return values.astype(np.float32, copy=False)
                break
        return np.zeros(layout.size, np.float32)

    def keep_residual(self, client: int, server_round: int, residual: Vector) -> None:
        """Write a client's residual of a round and drop older ones."""
        path = self.directory / f"residual-{client}-{server_round:06d}.f32"
        temporary = path.with_suffix(".tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                residual.astype("<f4", copy=False).tofile(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            for _, old in self._files(client)[KEPT:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise FedqError(f"cannot keep client state in {self.directory}: {error}") from error

    def _files(self, client: int) -> list[tuple[int, Path]]:
        found = self.directory.glob(f"residual-{client}-*.f32")
        return sorted(((int(p.stem.rsplit("-", 1)[1]), p) for p in found), reverse=True)
