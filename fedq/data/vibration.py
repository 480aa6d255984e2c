"""Made-up vibration of rotating machines, sound ones and damaged ones, from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import random
from fedq.data._recordings import Recording, dataset
from fedq.data.base import Data, Dataset
from fedq.data.sound import FrontEnd
from fedq.errors import ConfigError
from fedq.registry import register

_RATE, _SECONDS = 8_000, 2.0


@register("data", "vibration")
class Vibration(Data):
    """Generate two-second recordings of an accelerometer at 8 kHz, one machine per client.

    Real recordings need a download (``data=machine_sounds``); this stands in for them in tests and
    presets. A machine is a shaft of 20 to 40 turns per second, with harmonics of amplitudes of its
    own, and noise through a resonance of its own. From recording to recording speed and harmonics
    vary by some per cent, and all of it by a load, log-normal of 0.25. A damaged bearing adds
    impulses at 3 to 5 times the shaft's speed, with jitter, that ring in the resonance (McFadden
    and Smith 1984): ``severity`` is their peak over the deviation of the sound machine. Half of the
    test recordings are damaged.

    Args:
      machines: Clients of the natural partition.
      recordings: To train with, per machine; all are sound.
      tests: To test with, per machine.
      severity: Of the damage.
      seed: Of the generator; the run's seed does not count.

    Example:
      >>> Vibration(machines=2, recordings=2, tests=2).load().input_shape
      (640,)

    Reference:
      McFadden and Smith 1984, "Model for the vibration produced by a single point defect in a
      rolling element bearing", Journal of Sound and Vibration 96.
    """

    machines: int = 8
    recordings: int = 24
    tests: int = 24
    severity: float = 1.0
    seed: int = 0

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"machines": 3, "recordings": 3, "tests": 4},
    )

    def __post_init__(self) -> None:
        if min(self.machines, self.recordings) < 1 or self.tests < 2:
            raise ConfigError(
                "data.machines and data.recordings must be at least 1, data.tests at least 2"
            )
        if not 0 <= self.severity < np.inf:
            raise ConfigError(f"data.severity must be finite and not negative, not {self.severity}")

    def load(self) -> Dataset:
        """Generate the recordings and compute their features."""
        front = FrontEnd(
            rate=_RATE,
            window_s=0.064,
            step_s=0.032,
            bands=128,
            coefficients=0,
            low_hz=0,
            high_hz=_RATE / 2,
        )
        return dataset(self._recordings(), front, frames=5, hop=5)

    def _recordings(self) -> Iterator[Recording]:
        for number in range(self.machines):
            rng = random.generator(random.derive(self.seed, number, "machine"))
            machine = _Machine(rng)
            for i in range(self.recordings + self.tests):
                test = i >= self.recordings
                damaged = test and i % 2 == 1
                samples = machine.record(rng, self.severity if damaged else 0.0)
                yield Recording(samples, str(number), damaged, test)


class _Machine:
    def __init__(self, rng: np.random.Generator) -> None:
        self.speed_hz = rng.uniform(20, 40)
        self.defect_per_turn = rng.uniform(3, 5)
        self.amplitudes = rng.uniform(0.3, 1, 12) / np.arange(1, 13)
        self.noise = rng.uniform(0.5, 1.0)
        frequency, damping_per_s = rng.uniform(1200, 3000), rng.uniform(300, 800)
        time = np.arange(int(0.02 * _RATE)) / _RATE
        self.ring = np.exp(-damping_per_s * time) * np.sin(2 * np.pi * frequency * time)

    def record(self, rng: np.random.Generator, severity: float) -> NDArray[np.float32]:
        """Return one recording."""
        count = int(_SECONDS * _RATE)
        speed = self.speed_hz * rng.normal(1, 0.02)
        turns = speed * np.arange(count) / _RATE
        phases = rng.uniform(0, 2 * np.pi, len(self.amplitudes))
        loads = self.amplitudes * rng.normal(1, 0.1, len(self.amplitudes))
        harmonics = np.arange(1, len(loads) + 1)[:, None]
        signal = loads @ np.sin(2 * np.pi * harmonics * turns + phases[:, None])
        noise = rng.normal(size=count)
        signal += self.noise * (0.3 * noise + 0.3 * np.convolve(noise, self.ring)[:count])
        if severity:
            gap = _RATE / (speed * self.defect_per_turn)
            places = np.cumsum(gap * rng.normal(1, 0.02, int(count / gap)))
            places = places[places < count].astype(int)
            impulses = np.zeros(count)
            impulses[places] = severity * signal.std() * rng.normal(1, 0.2, len(places))
            signal += np.convolve(impulses, self.ring / np.abs(self.ring).max())[:count]
        return (0.1 * rng.lognormal(0, 0.25) * signal).astype(np.float32)
