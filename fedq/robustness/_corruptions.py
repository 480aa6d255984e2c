"""Common corruptions (Hendrycks & Dietterich 2019, ICLR, arXiv:1903.12261) and sensor faults.

Images come and go as float64 of [0, 1], shape (n, C, H, W); series and features standardised,
shapes (n, C, T) and (n, F). Lengths in pixels are of an image of 28 and grow with it. Strengths for
images follow ImageNet-C and MNIST-C (Mu & Gilmer 2019, arXiv:1906.02337).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from fedq.data.base import Kind

Array = NDArray[np.float64]
Change = Callable[[Array, float, np.random.Generator], Array]
SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 28.0


@dataclass(frozen=True)
class Corruption:
    """One way in which inputs go wrong.

    Attributes:
      name: Of the corruption.
      category: What it belongs to, such as ``noise``.
      kind: Of the inputs that it is for.
      levels: Its strength at each severity.
      change: Of (inputs, strength, generator) to inputs of the same shape.
    """

    name: str
    category: str
    kind: Kind
    levels: tuple[float, ...]
    change: Change

    def __call__(self, x: Array, severity: int, rng: np.random.Generator) -> Array:
        """Return corrupted inputs; images stay in [0, 1]."""
        changed = self.change(x, self.levels[severity - 1], rng)
        return changed.clip(0, 1) if self.kind == "image" else changed


CORRUPTIONS: list[Corruption] = []


def _corruption(
    category: str, *kinds: Kind, levels: tuple[float, float, float, float, float]
) -> Callable[[Change], Change]:
    def decorate(change: Change) -> Change:
        name = change.__name__.strip("_").replace("_", " ")
        CORRUPTIONS.extend(Corruption(name, category, kind, levels, change) for kind in kinds)
        return change

    return decorate


# --- images --------------------------------------------------------------------------------------


@_corruption("noise", "image", levels=(0.08, 0.12, 0.18, 0.26, 0.38))
def _gaussian_noise(x: Array, level: float, rng: np.random.Generator) -> Array:
    noise: Array = level * rng.standard_normal(x.shape)
    return x + noise


@_corruption("noise", "image", levels=(60, 25, 12, 5, 3))
def _shot_noise(x: Array, level: float, rng: np.random.Generator) -> Array:
    counts: Array = rng.poisson(x * level).astype(np.float64)
    return counts / level


@_corruption("noise", "image", levels=(0.03, 0.06, 0.09, 0.17, 0.27))
def _impulse_noise(x: Array, level: float, rng: np.random.Generator) -> Array:
    hit = rng.random(x.shape) < level
    return np.where(hit, rng.random(x.shape) < 0.5, x).astype(np.float64)


@_corruption("blur", "image", levels=(0.4, 0.6, 0.8, 1.2, 1.8))
def _gaussian_blur(x: Array, level: float, rng: np.random.Generator) -> Array:
    width = level * max(x.shape[-1] / _SIDE, 0.8)  # a narrower one changes nothing
    return np.asarray(ndimage.gaussian_filter(x, (0, 0, width, width)))


@_corruption("blur", "image", levels=(2, 3, 4, 6, 8))
def _motion_blur(x: Array, level: float, rng: np.random.Generator) -> Array:
    length = max(2, round(level * x.shape[-1] / _SIDE))
    along = rng.random(len(x)) < 0.5
    out = np.empty_like(x)
    out[along] = ndimage.uniform_filter1d(x[along], length, axis=3, mode="nearest")
    out[~along] = ndimage.uniform_filter1d(x[~along], length, axis=2, mode="nearest")
    return out


@_corruption("weather", "image", levels=(0.3, 0.5, 0.7, 0.9, 1.2))
def _fog(x: Array, level: float, rng: np.random.Generator) -> Array:
    shape = (len(x), 1, *x.shape[2:])
    fog = np.zeros(shape)
    for octave in (2.0, 4.0, 8.0):
        width = octave * x.shape[-1] / _SIDE
        noise = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 0, width, width))
        fog += octave * noise / noise.std()
    low, high = fog.min((2, 3), keepdims=True), fog.max((2, 3), keepdims=True)
    fog = (fog - low) / np.maximum(high - low, 1e-12)
    foggy: Array = (x + level * fog) / (1 + level)
    return foggy


@_corruption("weather", "image", levels=(0.01, 0.02, 0.035, 0.05, 0.08))
def _snow(x: Array, level: float, rng: np.random.Generator) -> Array:
    flakes = (rng.random((len(x), 1, *x.shape[2:])) < level).astype(np.float64)
    length = max(2, round(3 * x.shape[-1] / _SIDE))
    streaks = ndimage.uniform_filter1d(flakes, length, axis=2, mode="wrap") * length
    snowy: Array = np.maximum(x, streaks.clip(0, 1))
    return snowy


@_corruption("weather", "image", levels=(0.1, 0.2, 0.3, 0.4, 0.5))
def _brightness(x: Array, level: float, rng: np.random.Generator) -> Array:
    return x + level


@_corruption("digital", "image", levels=(0.75, 0.5, 0.4, 0.3, 0.15))
def _contrast(x: Array, level: float, rng: np.random.Generator) -> Array:
    mean = x.mean((1, 2, 3), keepdims=True)
    flat: Array = mean + level * (x - mean)
    return flat


@_corruption("digital", "image", levels=(0.7, 0.55, 0.45, 0.35, 0.25))
def _pixelate(x: Array, level: float, rng: np.random.Generator) -> Array:
    rows, columns = (_coarser(side, max(1, round(side * level))) for side in x.shape[2:])
    coarse: Array = rows @ x @ columns.T
    return coarse


def _coarser(side: int, fewer: int) -> Array:
    """Return the matrix that averages a line of pixels into fewer, and repeats these."""
    edges = np.linspace(0, side, fewer + 1)
    pixels = np.arange(side)
    overlap = np.minimum(pixels + 1, edges[1:, None]) - np.maximum(pixels, edges[:-1, None])
    average = overlap.clip(0) / (side / fewer)
    spread: Array = average[np.minimum((pixels + 0.5) * fewer / side, fewer - 1).astype(int)]
    return spread


#: Luminance quantization of JPEG (ITU-T T.81, table K.1).
_JPEG = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)


@_corruption("digital", "image", levels=(25, 18, 15, 10, 7))
def _jpeg(x: Array, level: float, rng: np.random.Generator) -> Array:
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (0, -height % 8), (0, -width % 8)), mode="edge")
    n, channels, rows, columns = padded.shape
    blocks = padded.reshape(n, channels, rows // 8, 8, columns // 8, 8).swapaxes(3, 4)
    steps = np.clip((50 / level * _JPEG).round(), 1, None) / 255  # quality below 50
    coefficients = fft.dctn(blocks - 0.5, axes=(4, 5), norm="ortho")
    coded = fft.idctn((coefficients / steps).round() * steps, axes=(4, 5), norm="ortho") + 0.5
    whole: Array = coded.swapaxes(3, 4).reshape(padded.shape)
    return whole[:, :, :height, :width]


@_corruption("geometry", "image", levels=(5, 10, 15, 22, 30))
def _rotation(x: Array, level: float, rng: np.random.Generator) -> Array:
    left = rng.random(len(x)) < 0.5
    out = np.empty_like(x)
    for rows, angle in ((left, level), (~left, -level)):
        out[rows] = ndimage.rotate(x[rows], angle, (2, 3), reshape=False, order=1, mode="nearest")
    return out


@_corruption("geometry", "image", levels=(1, 2, 3, 4, 5))
def _translation(x: Array, level: float, rng: np.random.Generator) -> Array:
    pixels = max(1, round(level * x.shape[-1] / _SIDE))
    away = rng.integers(0, 4, len(x))
    out = np.empty_like(x)
    for direction, shift in enumerate(((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels))):
        rows = away == direction
        out[rows] = ndimage.shift(x[rows], (0, 0, *shift), order=0, mode="nearest")
    return out


# --- series and features -------------------------------------------------------------------------


@_corruption("noise", "series", "features", levels=(0.1, 0.2, 0.4, 0.7, 1.0))
def _sensor_noise(x: Array, level: float, rng: np.random.Generator) -> Array:
    noise: Array = level * rng.standard_normal(x.shape)
    return x + noise


@_corruption("sensor fault", "series", levels=(0.05, 0.1, 0.2, 0.35, 0.5))
def _dropouts(x: Array, level: float, rng: np.random.Generator) -> Array:
    """Hold the last value through bursts of lost samples, all channels at once."""
    n, _, length = x.shape
    burst = max(2, length // 20)
    starts = rng.random((n, length)) < level / burst
    lost = np.asarray(ndimage.maximum_filter1d(starts, burst, axis=1, origin=-(burst // 2)))
    held = np.where(lost, 0, np.arange(length))
    held = np.maximum.accumulate(held, axis=1)
    return np.take_along_axis(x, np.broadcast_to(held[:, None], x.shape), axis=2)


@_corruption("sensor fault", "series", levels=(0.2, 0.4, 0.6, 0.8, 1.0))
def _stuck_channel(x: Array, level: float, rng: np.random.Generator) -> Array:
    """Freeze one channel of each example for a part of its time, up to the end."""
    out = x.copy()
    start = round((1 - level) * (x.shape[2] - 1))
    rows, channel = np.arange(len(x)), rng.integers(0, x.shape[1], len(x))
    out[rows, channel, start:] = x[rows, channel, start][:, None]
    return out


@_corruption("sensor fault", "series", levels=(0.25, 0.5, 1.0, 1.5, 2.0))
def _bias_drift(x: Array, level: float, rng: np.random.Generator) -> Array:
    signs = rng.choice([-1.0, 1.0], (*x.shape[:2], 1))
    return x + level * signs * np.linspace(0, 1, x.shape[2])


@_corruption("sensor fault", "series", "features", levels=(2.5, 2.0, 1.5, 1.0, 0.6))
def _clipping(x: Array, level: float, rng: np.random.Generator) -> Array:
    return x.clip(-level, level)


@_corruption("sensor fault", "series", "features", levels=(0.1, 0.2, 0.3, 0.4, 0.5))
def _gain_error(x: Array, level: float, rng: np.random.Generator) -> Array:
    shape = (*x.shape[:2], *[1] * (x.ndim - 2))
    return x * (1 + level * rng.choice([-1.0, 1.0], shape))


@_corruption("sensor fault", "series", levels=(0.01, 0.02, 0.04, 0.08, 0.16))
def _resampling_jitter(x: Array, level: float, rng: np.random.Generator) -> Array:
    """Sample with a clock that is too fast or slow by ``level``, and unsteady by as much."""
    length = x.shape[2]
    steps = 1 + level * (rng.choice([-1.0, 1.0], (len(x), 1)) + rng.standard_normal((1, length)))
    times = np.cumsum(steps.clip(0, None), axis=1) - steps[:, :1]
    grid = np.arange(length)
    out = np.empty_like(x)
    for row, at in enumerate(times):
        for channel in range(x.shape[1]):
            out[row, channel] = np.interp(at, grid, x[row, channel])
    return out


@_corruption("sensor fault", "features", levels=(0.05, 0.1, 0.2, 0.35, 0.5))
def _missing(x: Array, level: float, rng: np.random.Generator) -> Array:
    """Put the training mean, which is zero, in the place of lost values."""
    return np.where(rng.random(x.shape) < level, 0.0, x)


@_corruption("sensor fault", "features", levels=(0.25, 0.5, 1.0, 1.5, 2.0))
def _bias(x: Array, level: float, rng: np.random.Generator) -> Array:
    return x + level * rng.choice([-1.0, 1.0], x.shape)
