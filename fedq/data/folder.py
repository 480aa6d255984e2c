"""Your own images or sounds in class folders, the layout of ImageFolder, https://docs.pytorch.org/vision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.data._media import read_wav, stack_images
from fedq.data.base import Data, Dataset, Kind, check_fraction, stratified
from fedq.errors import ConfigError
from fedq.registry import register

_IMAGES = frozenset({".png", ".jpg", ".jpeg"})
_SOUNDS = frozenset({".wav"})

Example = tuple[Path, str]


@register("data", "folder")
class Folder(Data):
    """Load images or sounds from one folder per class, as ImageFolder lays them out.

    Either ``PATH/train/CLASS/FILE`` and ``PATH/test/CLASS/FILE``, or ``PATH/CLASS/FILE``, which is
    split by class. Images (png, jpg) become (H, W) or (H, W, 3) uint8; sounds (wav, 8 or 16 bits)
    become series (T, C) of a fixed length, cut or padded with silence at the end.

    Args:
      path: The folder.
      size: Images are resized to this many pixels on both sides; 0 keeps a size that all share.
      seconds: Length of a sound.
      rate: Samples per second, a divisor of every file's; 0 keeps a rate that all share.
      test_fraction: Held out from every class where there is no ``test`` folder.
      seed: Chooses the files held out; the run's seed does not.
      client_separator: The part of a file name before it names the client of the natural
        partition, as in ``anna_07.wav``; empty for none.

    Example:
      >>> from PIL import Image
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as root:
      ...     for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
      ...         file = pathlib.Path(root, name)
      ...         file.parent.mkdir(exist_ok=True)
      ...         Image.new("RGB", (32, 24)).save(file)
      ...     Folder(path=root, test_fraction=0.5).load().input_shape
      (3, 24, 32)
    """

    path: str
    size: int = 0
    seconds: float = 1.0
    rate: int = 0
    test_fraction: float = 0.2
    seed: int = 0
    client_separator: str = ""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __post_init__(self) -> None:
        if self.size < 0 or self.rate < 0:
            raise ConfigError("data.size and data.rate must be positive, or 0 to keep the files'")
        if not 0 < self.seconds < 3600:
            raise ConfigError(f"data.seconds must lie in (0, 3600), not {self.seconds}")
        check_fraction(self.test_fraction, "data.test_fraction")

    def load(self) -> Dataset:
        """Read all files."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ConfigError(f"data.path={self.path}: no such folder")
        if (root / "train").is_dir() and (root / "test").is_dir():
            train, test = _scan(root / "train", self.path), _scan(root / "test", self.path)
        else:
            found = _scan(root, self.path)
            rows, held = stratified(
                np.array([label for _, label in found]), self.test_fraction, self.seed
            )
            train, test = [found[i] for i in rows], [found[i] for i in held]
        files = [file for file, _ in train + test]
        sounds = {file.suffix.lower() in _SOUNDS for file in files}
        if len(sounds) > 1:
            raise ConfigError(f"{self.path} holds both images and sounds; give each its own folder")
        x, kind = self._sounds(files, root) if sounds == {True} else self._images(files)
        n = len(train)
        return Dataset.of(
            x[:n],
            np.array([label for _, label in train]),
            x[n:],
            np.array([label for _, label in test]),
            kind=kind,
            client_train=self._clients(train) if self.client_separator else None,
        )

    def _clients(self, examples: Sequence[Example]) -> NDArray[np.str_]:
        for file, _ in examples:
            if self.client_separator not in file.name:
                raise ConfigError(
                    f"{self.path}: {file.name} has no '{self.client_separator}' after a client's "
                    "name; rename it or unset data.client_separator"
                )
        return np.array([file.name.split(self.client_separator)[0] for file, _ in examples])

    def _images(self, files: Sequence[Path]) -> tuple[NDArray[Any], Kind]:
        if find_spec("PIL") is None:
            raise ConfigError("images need Pillow: pip install -e '.[data-media]'")
        from PIL import Image, UnidentifiedImageError

        images = []
        for file in files:
            try:
                with Image.open(file) as image:
                    image.load()
                    images.append(image.copy())
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
                raise ConfigError(f"{file} is not a readable image: {error}") from None
        return stack_images(images, self.size, self.path), "image"

    def _sounds(self, files: Sequence[Path], root: Path) -> tuple[NDArray[Any], Kind]:
        loaded = [read_wav(file, self.rate, str(file)) for file in files]
        rates = sorted({rate for _, rate in loaded})
        if len(rates) > 1:
            raise ConfigError(
                f"{self.path} has sounds of several rates ({', '.join(map(str, rates[:3]))} samples"
                " per second); set data.rate to a common divisor"
            )
        channels = {samples.shape[1] for samples, _ in loaded}
        if len(channels) > 1:
            raise ConfigError(f"{self.path} has both mono and stereo sounds; convert one of them")
        x = np.zeros((len(files), max(round(self.seconds * rates[0]), 1), channels.pop()), "f4")
        for row, (samples, _) in zip(x, loaded, strict=True):
            length = min(len(row), len(samples))
            row[:length] = samples[:length]
        return x, "series"


def _scan(folder: Path, where: str) -> list[Example]:
    """Return the media files below class folders and their classes, sorted by name."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise ConfigError(f"{where} has no class folders; put files into {folder.name}/CLASS/")
    found = []
    for label in classes:
        files = sorted(p for p in label.iterdir() if p.suffix.lower() in _IMAGES | _SOUNDS)
        files = [file for file in files if not file.name.startswith(".")]
        if not files:
            raise ConfigError(f"{where}: class folder {label.name} has no png, jpg or wav files")
        found += [(file, label.name) for file in files]
    return found
