"""Spoken words, one second each: Speech Commands, Warden 2018, https://arxiv.org/abs/1804.03209."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedq import random
from fedq.data.base import Data, Dataset
from fedq.data.sound import FrontEnd, fit, found, read_all, read_mono
from fedq.errors import ConfigError
from fedq.registry import register

NOISE, SILENCE, UNKNOWN = "_background_noise_", "_silence_", "_unknown_"
#: The ten words of MLPerf Tiny's keyword spotting.
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_RATE, _SECONDS = 16_000, 1.0
_SPEAKER = re.compile(r"^(?P<speaker>[^_]+)_nohash_\d+\.wav$", re.IGNORECASE)


Half = Literal["train", "validation", "test"]


class _Clip(NamedTuple):
    file: Path
    label: str
    speaker: str
    half: Half


@register("data", "speech_commands")
class SpeechCommands(Data):
    """Load MFCC of Speech Commands, in its own layout: ``WORD/SPEAKER_nohash_N.wav``.

    Inputs are spectra (49, 10) as in MLPerf Tiny: 10 MFCC of 40 mel bands every 20 ms. What
    ``testing_list.txt`` names is the test set, what ``validation_list.txt`` names is left out;
    without these files, speakers are told apart by their hash, as the data set's authors do. The
    natural partition is by speaker.

    Args:
      path: The unpacked folder.
      words: Classes; other words become ``_unknown_``. Empty makes every word a class.
      share: Of the words' clips: so many clips of other words, and so many of silence, cut at
        random from ``_background_noise_``. 0 leaves both classes out.
      test: Which list judges.
      seed: Chooses unknown words and silence; the run's seed does not.

    Example:
      >>> SpeechCommands(path="~/speech_commands_v2").words[:2]
      ('yes', 'no')

    Reference:
      Warden 2018, "Speech Commands: a dataset for limited-vocabulary speech recognition"; Banbury
      et al. 2021, "MLPerf Tiny benchmark", NeurIPS Datasets and Benchmarks.
    """

    path: str
    words: tuple[str, ...] = WORDS
    share: float = 0.1
    test: Literal["test", "validation"] = "test"
    seed: int = 0

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"data.share must lie in [0, 1], not {self.share}")

    def load(self) -> Dataset:
        """Read the clips and compute their features."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ConfigError(f"data.path={self.path}: no such folder")
        clips = self._clips(root)
        front = FrontEnd(rate=_RATE)
        halves: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        for half in ("train", self.test):
            chosen = self._chosen([clip for clip in clips if clip.half == half], half)
            if not chosen:
                raise ConfigError(f"{self.path} has no clips of these words to {half}")
            x = read_all((clip.file for clip in chosen), front, _SECONDS)
            y = np.array([clip.label for clip in chosen])
            speakers = np.array([clip.speaker for clip in chosen])
            halves.append(self._with_silence(root, front, half, x, y, speakers))
        (x, y, speakers), (x_test, y_test, _) = halves
        try:
            return Dataset.of(x, y, x_test, y_test, kind="spectrum", client_train=speakers)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def _clips(self, root: Path) -> list[_Clip]:
        folders = {path.name for path in root.iterdir() if path.is_dir()} - {NOISE}
        missing = [word for word in self.words if word not in folders]
        if missing or not folders:
            raise ConfigError(
                f"{self.path} has no folders of words {', '.join(missing[:5])}".rstrip()
                + "; give the unpacked data set, or its words as data.words"
            )
        lists = _lists(root)
        clips = []
        for file in found(root, "*/*"):
            if file.parent.name == NOISE:
                continue
            match = _SPEAKER.match(file.name)
            if match is None:
                raise ConfigError(f"{file} is not named SPEAKER_nohash_N.wav; rename or remove it")
            speaker = match["speaker"]
            key = f"{file.parent.name}/{file.name}"
            half = _half_of(speaker) if lists is None else lists.get(key, "train")
            clips.append(_Clip(file, file.parent.name, speaker, half))
        return clips

    def _chosen(self, clips: list[_Clip], half: str) -> list[_Clip]:
        """Return the clips of the words, and some of the others."""
        if not self.words:
            return clips
        own = [clip for clip in clips if clip.label in self.words]
        others = [clip for clip in clips if clip.label not in self.words]
        count = min(round(self.share * len(own)), len(others))
        rng = random.generator(random.derive(self.seed, "unknown", half))
        rows = np.sort(rng.permutation(len(others))[:count])
        return own + [others[i]._replace(label=UNKNOWN) for i in rows]

    def _with_silence(
        self,
        root: Path,
        front: FrontEnd,
        half: str,
        x: NDArray[np.float32],
        y: NDArray[Any],
        speakers: NDArray[Any],
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any]]:
        """Add seconds of background noise at random loudness, shared out over the speakers."""
        noises = [read_mono(file, _RATE) for file in found(root, f"{NOISE}/*")]
        count = round(self.share * len(y)) if self.words and noises else 0
        if not count:
            return x, y, speakers
        rng = random.generator(random.derive(self.seed, "silence", half))
        length = round(_SECONDS * _RATE)
        pieces = []
        for _ in range(count):
            noise = noises[rng.integers(len(noises))]
            start = rng.integers(max(len(noise) - length, 0) + 1)
            loudness = np.float32(rng.uniform())
            pieces.append(front(loudness * fit(noise[start : start + length], length)))
        return (
            np.concatenate([x, np.stack(pieces)]),
            np.concatenate([y, np.full(count, SILENCE)]),
            np.concatenate([speakers, rng.choice(np.unique(speakers), count)]),
        )


def _lists(root: Path) -> dict[str, Half] | None:
    """Return which clips the data set's own lists hold back; None if it has none."""
    found_lists: dict[str, Half] = {}
    halves: tuple[tuple[str, Half], ...] = (
        ("validation_list.txt", "validation"),
        ("testing_list.txt", "test"),
    )
    if not any((root / name).is_file() for name, _ in halves):
        return None
    for name, half in halves:
        try:
            names = (root / name).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(
                f"{root / name} is missing or no text; unpack the data set again"
            ) from None
        found_lists.update(dict.fromkeys(names, half))
    return found_lists


def _half_of(speaker: str) -> Half:
    """Return where the data set's authors put a speaker: 10 % each to validate and to test."""
    share = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % 2**27 * (100 / (2**27 - 1))
    return "validation" if share < 10 else "test" if share < 20 else "train"
