"""Spectral features of sound: log mel energies and MFCC (Davis and Mermelstein 1980, ASSP 28)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedq.data._media import read_wav
from fedq.errors import ConfigError

#: Added to mel energies before the logarithm, so that silence has one.
FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class FrontEnd:
    """From samples to (frames, bins) features; NumPy alone, so that a device has it, too.

    Frames of ``window_s`` every ``step_s``, none beyond the end, under a periodic Hann window;
    power spectrum of the next power of two; triangular mel bands (HTK's scale, peaks 1) between
    ``low_hz`` and ``high_hz``; ``ln(energy + 1e-6)``; and, unless ``coefficients`` is 0, the first
    of an orthonormal DCT-II.

    Args:
      rate: Samples per second.
      window_s: Length of a frame.
      step_s: Between the starts of frames.
      bands: Mel bands.
      coefficients: MFCC kept; 0 keeps the log mel energies.
      low_hz: Of the lowest band.
      high_hz: Of the highest, at most half the rate.

    Example:
      >>> FrontEnd(rate=16000)(np.zeros(16000, np.float32)).shape
      (49, 10)
    """

    rate: int
    window_s: float = 0.04
    step_s: float = 0.02
    bands: int = 40
    coefficients: int = 10
    low_hz: float = 20.0
    high_hz: float = 4000.0

    def __post_init__(self) -> None:
        if min(self.window, self.step, self.bands) < 1 or not 0 <= self.coefficients <= self.bands:
            raise ConfigError(
                "features need windows and steps of a sample or more, at least one band, and 0 to"
                f" {self.bands} coefficients"
            )
        if not 0 <= self.low_hz < self.high_hz <= self.rate / 2:
            raise ConfigError(
                f"bands from {self.low_hz} to {self.high_hz} Hz do not fit {self.rate} samples per"
                " second"
            )

    @property
    def window(self) -> int:
        """Samples of a frame."""
        return round(self.window_s * self.rate)

    @property
    def step(self) -> int:
        """Samples between frames."""
        return round(self.step_s * self.rate)

    @cached_property
    def _size(self) -> int:
        return 1 << (self.window - 1).bit_length()

    @cached_property
    def _hann(self) -> NDArray[np.float64]:
        return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window) / self.window)

    @cached_property
    def filters(self) -> NDArray[np.float64]:
        """(spectrum, bands) weights of each frequency in each band."""
        mel = np.linspace(_mel(self.low_hz), _mel(self.high_hz), self.bands + 2)
        edges = 700 * (10 ** (mel / 2595) - 1)
        hertz = np.arange(self._size // 2 + 1)[:, None] * self.rate / self._size
        rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
        weights: NDArray[np.float64] = np.clip(np.minimum(rising, falling), 0, None)
        return weights

    @cached_property
    def _cosines(self) -> NDArray[np.float64]:
        """(bands, coefficients) of the orthonormal DCT-II."""
        place = np.arange(self.bands)[:, None] + 0.5
        cosines: NDArray[np.float64] = np.cos(
            np.pi / self.bands * place * np.arange(self.coefficients)
        )
        cosines *= np.sqrt(2 / self.bands)
        cosines[:, :1] /= np.sqrt(2)
        return cosines

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the features, (frames, bands or coefficients), of (n,) samples in [-1, 1).

        Raises:
          ConfigError: If the sound is shorter than a frame.
        """
        if len(samples) < self.window:
            raise ConfigError(f"a sound of {len(samples)} samples has no frame of {self.window}")
        frames = np.lib.stride_tricks.sliding_window_view(samples, self.window)[:: self.step]
        spectrum = np.fft.rfft(frames.astype(np.float64) * self._hann, self._size)
        energies = (spectrum.real**2 + spectrum.imag**2) @ self.filters
        features = np.log(energies + FLOOR)
        if self.coefficients:
            features = features @ self._cosines
        return features.astype(np.float32)


def _mel(hertz: float) -> float:
    return float(2595 * np.log10(1 + hertz / 700))


def read_all(files: Iterable[Path], front: FrontEnd, seconds: float) -> NDArray[np.float32]:
    """Return the features of sound files, (N, frames, bins), each cut or padded with silence.

    Several channels are averaged.

    Raises:
      ConfigError: If a file is not readable; the error names it.
    """
    length = round(seconds * front.rate)
    return np.stack([front(fit(read_mono(file, front.rate), length)) for file in files])


def read_mono(file: Path, rate: int) -> NDArray[np.float32]:
    """Return a file's samples, (n,), at a rate; several channels are averaged."""
    samples, _ = read_wav(file, rate, str(file))
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(1, dtype=np.float32)


def fit(samples: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """Return samples cut, or padded with silence at the end, to a length."""
    return np.pad(samples[:length], (0, max(length - len(samples), 0)))


def found(root: Path, pattern: str) -> list[Path]:
    """Return a folder's wav files by a pattern, sorted by name; hidden ones are left out."""
    return sorted(
        path
        for path in root.glob(pattern)
        if path.suffix.lower() == ".wav" and not path.name.startswith(".")
    )
