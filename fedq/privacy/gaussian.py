"""Client-level privacy by Gaussian noise on the server, McMahan et al. 2018, arXiv:1710.06963."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.privacy._clip import clipped
from fedq.privacy._entropy import Entropy
from fedq.privacy._ledger import Rdp, gaussian_epsilon, gaussian_rdp
from fedq.privacy._samplers import MAX_TABLE_SIGMA, discrete_gaussian, gaussian_table
from fedq.privacy.base import ClientLevel, Protected, Round
from fedq.registry import register

#: The noise's standard deviation in units of the grid that it lies on.
GRID = 1 << 22


@register("privacy", "gaussian")
class Gaussian(ClientLevel):
    """Clip each update to norm C, add Gaussian noise to the sum, divide by the cohort.

    ::

        (sum_i min(1, C / |u_i|) u_i + N(0, (z C)^2 I)) / m

    Clients clip before the codec, and the server clips again what it decodes: neither a dithered
    code nor a hostile client exceeds the bound. Updates weigh the same. m is the number of clients
    asked, not of those that answered: a divisor that depended on whose update counted would be one
    more release. Noise is added in integers, see :func:`noisy_sum`.

    Example:
      >>> from fedq.registry import build
      >>> build("privacy", "gaussian", noise_multiplier=1.0, clip=0.5).sigma
      1.0

    Reference:
      McMahan et al. 2018, "Learning differentially private recurrent language models", algorithm 1
      (without sampling by chance); Canonne, Kamath and Steinke 2020 (integers).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"noise_multiplier": 1.0},
        {"epsilon": 8.0, "clip": 0.3, "seeded": True},
    )
    against: ClassVar[str] = (
        "whoever sees the released models; not against the server, which sees each update"
    )
    accountant: ClassVar[str] = "exact for composed Gaussian releases (equal to PLD)"

    def protect(self, delta: Vector, about: Round, entropy: Entropy) -> Protected:
        """Return the update clipped, so that the codec's range fits it."""
        return Protected(clipped(delta, self.clip))

    def received(self, delta: Vector) -> Vector:
        """Return a decoded update within the bound, whoever sent it."""
        return clipped(delta, self.clip)

    @property
    def sum_sigma(self) -> float:
        """The noise multiplier of the sum of updates."""
        return self.sigma

    def release(self, mean: NDArray[Any], replies: int, about: Round, entropy: Entropy) -> Vector:
        """Return the noisy sum over the cohort's size, (d,) float32."""
        total = noisy_sum(
            mean.astype(np.float64) * replies, self.clip, self.sum_sigma, replies, entropy
        )
        total /= about.cohort
        return total.astype(np.float32)

    def rdp(self, replies: int, about: Round) -> Rdp:
        """Return ``alpha / (2 z**2)``, whatever the replies: the server's noise is all there."""
        return gaussian_rdp(self.sigma)

    def epsilon_of(self, rdp: Rdp) -> float:
        """Return the exact epsilon."""
        return gaussian_epsilon(rdp, self.delta)


def noisy_sum(
    total: NDArray[np.float64],
    bound: float,
    sigma: float,
    replies: int,
    entropy: Entropy,
    grid: int = GRID,
) -> NDArray[np.float64]:
    """Return a (d,) sum of vectors of norm ``bound`` at most, plus Gaussian noise on a grid.

    The sum is rounded to a grid, and the noise is a discrete Gaussian of many steps, so that no low
    bit of a floating-point number gives anything away. Of what two sums that differ by one vector
    differ by, the bound is the most part; the float32 arithmetic they come from and the grid add
    ``replies bound 2**-23 + g sqrt(d)``, with g the grid's step. The noise is ``sigma`` times all
    of it. At this many steps the discrete Gaussian's privacy is the Gaussian's: exactly so in RDP,
    and in epsilon to within what the privacy loss moves when each coordinate moves by a step,
    ``sqrt(d) / (sigma grid)`` at most.

    Args:
      total: The sum.
      bound: On the norm of each vector in it.
      sigma: Noise multiplier.
      replies: Vectors in the sum.
      entropy: Of the noise.
      grid: Steps of the grid per standard deviation; up to 2**14 are fast to sample.
    """
    exact = bound * (1 + replies * 2.0**-23)
    coarseness = sigma * math.sqrt(total.size) / grid
    if coarseness >= 0.5:
        raise ConfigError(
            f"noise of {sigma:.3g} times the bound over {total.size} coordinates drowns everything;"
            " lower privacy.noise_multiplier or raise privacy.epsilon"
        )
    step = sigma * exact / (1 - coarseness) / grid
    if grid <= MAX_TABLE_SIGMA:
        noise = gaussian_table(grid).sample(total.size, entropy)
    else:
        noise = discrete_gaussian(grid, total.size, entropy)
    noisy: NDArray[np.float64] = np.rint(total / step)
    noisy += noise
    noisy *= step
    return noisy
