"""Your own arrays in one NumPy archive, https://numpy.org/doc/stable/reference/generated/numpy.savez.html."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq.data.base import Data, Dataset, Kind, TaskName
from fedq.errors import ConfigError
from fedq.registry import register

_KEYS = ("x_train", "y_train", "x_test", "y_test")
#: What NumPy, zipfile and zlib raise on files that are cut, damaged, encrypted or something else.
_BROKEN = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


@register("data", "npz")
class Npz(Data):
    """Load an ``.npz`` file with your own arrays (``numpy.savez``).

    Arrays ``x_train, y_train, x_test, y_test`` and optionally ``client_train``, an id per training
    row that makes ``partition=natural`` possible. Inputs are images (N, H, W) or (N, H, W, C),
    series (N, T, C), spectra (N, frames, bins) or features (N, F); labels and ids are integers or
    text. uint8 images are scaled to [0, 1], all else is standardised with training statistics.
    Nothing is unpickled.

    Args:
      path: The file.
      kind: What an example is. ``auto`` takes two dimensions for features, four for images, and
        three for grey images if they are uint8 or square, else for series.
      task: What is learned. A regression's ``y`` are numbers, (N,) or (N, k). A reconstruction's
        are 0 for normal examples and 1 for anomalies, which are in the test set alone.

    Example:
      >>> import tempfile
      >>> x, y = np.random.rand(20, 6).astype(np.float32), np.arange(20) % 3
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(f"{folder}/own.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
      ...     data = Npz(path=f"{folder}/own.npz").load()
      >>> data.kind, data.input_shape, data.classes
      ('features', (6,), 3)
    """

    path: str
    kind: Literal["auto", "image", "series", "spectrum", "features"] = "auto"
    task: TaskName = "classification"

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def load(self) -> Dataset:
        """Read the archive."""
        arrays = self._read()
        kind = self._kind(arrays["x_train"]) if self.kind == "auto" else self.kind
        try:
            return Dataset.of(
                *(arrays[key] for key in _KEYS),
                kind=kind,
                client_train=arrays.get("client_train"),
                task=self.task,
            )
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def _read(self) -> dict[str, NDArray[Any]]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ConfigError(f"data.path={self.path}: no such file")
        try:
            with path.open("rb") as file:  # np.load leaves a damaged file open if given a path
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ConfigError(
                        f"{self.path} is a single array; save several with numpy.savez"
                    )
                missing = [key for key in _KEYS if key not in archive.files]
                if missing:
                    raise ConfigError(
                        f"{self.path} lacks {', '.join(missing)}; "
                        f"it has {', '.join(archive.files) or 'no arrays'}"
                    )
                wanted = [*_KEYS, *({"client_train"} & set(archive.files))]
                return {key: self._array(archive, key) for key in wanted}
        except ConfigError:
            raise
        except _BROKEN as error:
            raise ConfigError(f"{self.path} is not a readable .npz file: {error}") from None

    def _array(self, archive: np.lib.npyio.NpzFile, key: str) -> NDArray[Any]:
        try:
            return np.asarray(archive[key])
        except ValueError as error:
            if "pickle" not in str(error):
                raise
            raise ConfigError(
                f"{self.path}: {key} is an object array; save plain numbers or text of one shape"
            ) from None

    def _kind(self, x: NDArray[Any]) -> Kind:
        if x.ndim == 2:
            return "features"
        if x.ndim == 4:
            return "image"
        if x.ndim == 3:
            return "image" if x.dtype == np.uint8 or x.shape[1] == x.shape[2] else "series"
        raise ConfigError(
            f"{self.path}: x_train has shape {x.shape}; it must be (N, F), (N, T, C), (N, H, W) or "
            "(N, H, W, C)"
        )
