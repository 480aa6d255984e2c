"""Sounds of machines, normal and anomalous: ToyADMOS and MIMII, as in DCASE 2020 task 2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedq.data._recordings import Recording, dataset
from fedq.data.base import Data, Dataset
from fedq.data.sound import FrontEnd, found, read_mono
from fedq.errors import ConfigError
from fedq.registry import register

_NAME = re.compile(r"^(?P<kind>normal|anomaly)_id_(?P<machine>\d+)_", re.IGNORECASE)


@register("data", "machine_sounds")
class MachineSounds(Data):
    """Load one kind of machine, such as ``ToyCar``; every machine id is a client.

    Either DCASE's layout, ``PATH/train/normal_id_00_NUMBER.wav`` and
    ``PATH/test/{normal,anomaly}_id_00_NUMBER.wav``, or MIMII's own,
    ``PATH/id_00/{normal,abnormal}/NUMBER.wav``, of which the first normal recordings, as many as
    are abnormal (at most half), are tested with.

    Inputs are (640,) features: five frames of 128 log mel energies, 64 ms every 32 ms. A
    recording's score is the mean error of its examples; the metric is the mean AUC over machines.

    Args:
      path: The folder of the kind of machine.
      rate: Samples per second, a divisor of the files'.
      frames: Per example.
      hop: Frames between the starts of examples; 1 as in MLPerf Tiny, which takes 5 times the
        memory.

    Example:
      >>> MachineSounds(path="dev_data/ToyCar").hop
      5

    Reference:
      Koizumi et al. 2019, "ToyADMOS"; Purohit et al. 2019, "MIMII dataset"; Koizumi et al. 2020,
      "Description and discussion on DCASE2020 challenge task 2".
    """

    path: str
    rate: int = 16_000
    frames: int = 5
    hop: int = 5

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __post_init__(self) -> None:
        if self.rate < 1 or self.frames < 1 or self.hop < 1:
            raise ConfigError("data.rate, data.frames and data.hop must be at least 1")

    def load(self) -> Dataset:
        """Read the recordings and compute their features."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise ConfigError(f"data.path={self.path}: no such folder")
        front = FrontEnd(
            rate=self.rate,
            window_s=0.064,
            step_s=0.032,
            bands=128,
            coefficients=0,
            low_hz=0,
            high_hz=self.rate / 2,
        )
        recordings = self._dcase(root) if (root / "train").is_dir() else self._mimii(root)
        try:
            return dataset(recordings, front, self.frames, self.hop)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def _dcase(self, root: Path) -> Iterator[Recording]:
        for half in ("train", "test"):
            for file in found(root, f"{half}/*"):
                match = _NAME.match(file.name)
                if match is None:
                    raise ConfigError(f"{half}/{file.name} is not named normal_id_00_NUMBER.wav")
                anomalous = match["kind"].lower() == "anomaly"
                samples = read_mono(file, self.rate)
                yield Recording(samples, match["machine"], anomalous, half == "test")

    def _mimii(self, root: Path) -> Iterator[Recording]:
        machines = sorted(path for path in root.glob("id_*") if path.is_dir())
        if not machines:
            raise ConfigError("it has neither train/ and test/ nor id_00/normal/")
        for machine in machines:
            normal, abnormal = (found(machine, f"{kind}/*") for kind in ("normal", "abnormal"))
            held = min(len(abnormal), len(normal) // 2)
            for number, file in enumerate([*normal, *abnormal]):
                anomalous = number >= len(normal)
                samples = read_mono(file, self.rate)
                yield Recording(samples, machine.name, anomalous, anomalous or number < held)
