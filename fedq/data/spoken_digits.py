"""Spoken digits, in the layout of https://github.com/Jakobovski/free-spoken-digit-dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedq.data.base import Data, Dataset
from fedq.data.sound import FrontEnd, found, read_all
from fedq.errors import ConfigError
from fedq.registry import register

_NAME = re.compile(r"^(?P<label>[^_]+)_(?P<speaker>.+)_(?P<number>\d+)\.wav$", re.IGNORECASE)


@register("data", "spoken_digits")
class SpokenDigits(Data):
    """Load MFCC of recordings named ``DIGIT_SPEAKER_N.wav`` in one folder.

    Inputs are spectra (frames, 10): 10 MFCC of 40 mel bands every 20 ms, 49 frames for a second.
    The natural partition is by speaker. Any word may stand in place of the digit.

    Args:
      path: The folder, or the one above its ``recordings``.
      rate: Samples per second; a divisor of the files'.
      seconds: Length of a clip; others are cut or padded with silence.
      held_out: Recordings of each word and speaker with a smaller number are the test set.

    Example:
      >>> SpokenDigits(path="free-spoken-digit-dataset").held_out
      5
    """

    path: str
    rate: int = 8_000
    seconds: float = 1.0
    held_out: int = 5

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.seconds < 3600 or self.held_out < 1:
            raise ConfigError(
                "data.seconds must lie in (0, 3600) and data.held_out be at least 1, not"
                f" {self.seconds} and {self.held_out}"
            )

    def load(self) -> Dataset:
        """Read the recordings and compute their features."""
        front = FrontEnd(rate=self.rate)
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ConfigError(f"data.path={self.path}: no such folder")
        files = found(root, "*") or found(root, "recordings/*")
        matches = [_NAME.match(file.name) for file in files]
        if not files or None in matches:
            wrong = files[matches.index(None)].name if files else "no wav files"
            raise ConfigError(
                f"{self.path} holds {wrong}; recordings are named DIGIT_SPEAKER_N.wav"
            )
        names = [match.groupdict() for match in matches if match]
        x = read_all(files, front, self.seconds)
        y, speakers = (np.array([name[key] for name in names]) for key in ("label", "speaker"))
        test = np.array([int(name["number"]) for name in names]) < self.held_out
        if test.all() or not test.any():
            raise ConfigError(
                f"{self.path}: data.held_out={self.held_out} leaves nothing to"
                f" {'train' if test.all() else 'test'} with"
            )
        try:
            return Dataset.of(
                x[~test],
                y[~test],
                x[test],
                y[test],
                kind="spectrum",
                client_train=speakers[~test],
            )
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
