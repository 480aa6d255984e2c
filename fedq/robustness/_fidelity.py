"""How much of an example is in its reconstruction."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

Example = NDArray[np.float32]

#: In decibels: of reconstructions without an error.
MOST_DB = 100.0
_WINDOW = 7
_STABLE = (0.01, 0.03)


def decibels(found: Example, truth: Example, span: float) -> float:
    """Return how far errors lie below the signal: PSNR of images, SNR of series and features.

    ``10 log10(p / mse)``, where p is the squared span of the data for images, whose blacks and
    whites are given, and the example's own variance for others, whose extremes are rare.

    Args:
      found: The reconstruction.
      truth: The example, of the same shape: (C, H, W), (C, T) or (F,).
      span: Largest minus smallest value that images have.

    Example:
      >>> black = np.zeros((1, 8, 8), np.float32)
      >>> round(decibels(black + np.float32(0.1), black, 1.0))
      20
    """
    error = float(np.square(found.astype(np.float64) - truth).mean())
    return ratio(error, truth, span)


def ratio(error: float, truth: Example, span: float) -> float:
    """Return the decibels of a mean squared error, within +-100."""
    power = span**2 if truth.ndim == 3 else float(truth.var(dtype=np.float64))
    if error == 0 or power == 0:
        return MOST_DB if error == 0 else -MOST_DB
    return min(max(10 * math.log10(power / error), -MOST_DB), MOST_DB)


def ssim(found: Example, truth: Example, span: float) -> float:
    """Return the mean structural similarity of two (C, H, W) images, windows of 7x7.

    Reference:
      Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    c1, c2 = ((k * span) ** 2 for k in _STABLE)
    values = []
    for a, b in zip(found.astype(np.float64), truth.astype(np.float64), strict=True):
        ma, mb = uniform_filter(a, _WINDOW), uniform_filter(b, _WINDOW)
        va = uniform_filter(a * a, _WINDOW) - ma**2
        vb = uniform_filter(b * b, _WINDOW) - mb**2
        covariance = uniform_filter(a * b, _WINDOW) - ma * mb
        similar = (2 * ma * mb + c1) * (2 * covariance + c2)
        values.append(float((similar / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()))
    return float(np.mean(values))


def correlation(found: Example, truth: Example) -> float:
    """Return Pearson's correlation over all values; 0 if one is constant."""
    a, b = found.astype(np.float64).ravel(), truth.astype(np.float64).ravel()
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b / size) if size else 0.0


def similarity(found: Example, truth: Example, span: float) -> float:
    """Return the structural similarity of images, the correlation of series and features."""
    return ssim(found, truth, span) if truth.ndim == 3 else correlation(found, truth)
