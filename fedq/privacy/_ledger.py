"""What each client has spent, as Rényi differential privacy, and the epsilon that follows.

Fed by what was executed: a client is charged for the rounds whose released sum holds its update, by
the noise that those sums got.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError

#: Rényi orders at which losses are kept; fractional ones matter for large epsilons.
ORDERS = np.array(
    [
        *(1 + k / 10 for k in range(1, 10)),
        *range(2, 17),
        *(18, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    ],
    np.float64,
)
Rdp = NDArray[np.float64]
#: Grid of privacy losses: ten times coarser than the package's, ten times faster, and as tight.
_LOSS_STEP = 1e-3


def dp_accounting() -> Any:
    """Return the package ``dp_accounting``, which only a run with privacy needs."""
    try:
        import dp_accounting as package
    except ImportError:
        raise ConfigError(
            "privacy needs dp-accounting to state an epsilon; pip install 'fedq[privacy]'"
        ) from None
    return package


def gaussian_rdp(noise_multiplier: float) -> Rdp:
    """Return the RDP of one Gaussian release, ``alpha / (2 z**2)``, (orders,).

    Reference:
      Mironov 2017, "Rényi differential privacy", corollary 3; the discrete Gaussian has no more:
      Canonne, Kamath and Steinke 2020, theorem 4 and proposition 5.
    """
    rdp: Rdp = ORDERS / (2 * noise_multiplier**2)
    return rdp


def gaussian_epsilon(rdp: Rdp, delta: float) -> float:
    """Return the exact epsilon of composed Gaussian releases from their total RDP.

    Gaussian releases of noise multipliers z_i compose to one of ``z**-2 = sum z_i**-2``, whose
    curve of epsilon and delta is known: less than what conversion from RDP gives.

    >>> round(gaussian_epsilon(gaussian_rdp(1.0), 1e-5), 3)
    4.377

    Reference:
      Balle and Wang 2018, "Improving the Gaussian mechanism for differential privacy", theorem 8.
    """
    square = float((2 * rdp / ORDERS).max())
    if square == 0:
        return 0.0
    with np.errstate(divide="ignore"):  # the logarithm of a delta of 0, under vast noise
        return float(dp_accounting().get_epsilon_gaussian(square**-0.5, delta))


def rdp_epsilon(rdp: Rdp, delta: float) -> float:
    """Return an epsilon that RDP implies.

    >>> round(rdp_epsilon(gaussian_rdp(1.0), 1e-5), 2)
    4.75

    Reference:
      Canonne, Kamath and Steinke 2020, proposition 12.
    """
    if not rdp.any():
        return 0.0
    epsilon, _ = dp_accounting().rdp.compute_epsilon(ORDERS, rdp, delta)
    return float(epsilon)


@lru_cache(maxsize=4096)
def sampled_gaussian_epsilon(
    noise_multiplier: float, share: float, steps: int, delta: float
) -> float:
    """Return an epsilon of Poisson-sampled Gaussian steps from their privacy loss distribution.

    It is rounded up, by about one part in ten thousand; a tenth less than what RDP gives.

    >>> round(sampled_gaussian_epsilon(1.0, 0.1, 50, 1e-5), 2)
    5.15

    Reference:
      Koskela, Jälkö and Honkela 2020, "Computing tight differential privacy guarantees using FFT".
    """
    package = dp_accounting()
    accountant = package.pld.PLDAccountant(value_discretization_interval=_LOSS_STEP)
    step = package.PoissonSampledDpEvent(share, package.GaussianDpEvent(noise_multiplier))
    accountant.compose(package.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


def smallest(enough: Callable[[float], bool]) -> float | None:
    """Return, to one part in ten thousand, the least value from which on ``enough`` holds.

    >>> round(smallest(lambda z: z >= 3), 3), smallest(lambda z: False)
    (3.0, None)
    """
    low, high = 2.0**-10, 2.0**-10
    while not enough(high):
        low, high = high, 2 * high
        if high > 2.0**20:
            return None
    while high > low * 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Ledger:
    """What clients have spent.

    Attributes:
      clients: (n,) uint64, numbers of the clients with a release, ascending.
      releases: (n,) int64, in how many released sums each has been.
      rdp: (n, orders) float64, each one's total.
      steps: (n,) int64, how many Poisson-sampled steps that total is of; 0 if it is of none.
      share: (n,) float64, the probability of an example in each of them; NaN if it has changed.
    """

    clients: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    releases: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    rdp: Rdp = field(default_factory=lambda: np.zeros((0, len(ORDERS))))
    steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    share: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def charged(
        self, clients: Sequence[int], rdp: Rdp, sampling: Sequence[tuple[float, int]] | None = None
    ) -> Ledger:
        """Return the ledger after one release.

        Args:
          clients: Distinct numbers of those whose updates are in it.
          rdp: (orders,) for each of them, or (clients, orders).
          sampling: Probability of an example and steps of each client, if it took sampled steps.

        Example:
          >>> ledger = Ledger().charged([7, 3], gaussian_rdp(1.0)).charged([3], gaussian_rdp(1.0))
          >>> ledger.clients, ledger.releases
          (array([3, 7], dtype=uint64), array([2, 1]))
        """
        new = np.array(clients, np.uint64)
        everyone = np.union1d(self.clients, new)
        releases = np.zeros(len(everyone), np.int64)
        total = np.zeros((len(everyone), len(ORDERS)))
        old = np.searchsorted(everyone, self.clients)
        releases[old], total[old] = self.releases, self.rdp
        at = np.searchsorted(everyone, new)
        releases[at] += 1
        total[at] += rdp
        steps, share = np.zeros(len(everyone), np.int64), np.zeros(len(everyone))
        steps[old], share[old] = self.steps, self.share
        if sampling is not None:
            now = np.array([one for one, _ in sampling])
            share[at] = np.where((steps[at] == 0) | (share[at] == now), now, np.nan)
            steps[at] += np.array([count for _, count in sampling], np.int64)
        return Ledger(everyone, releases, total, steps, share)

    def rows(self, clients: Sequence[int | None]) -> list[int | None]:
        """Return the rows of some clients; None for one without a release."""
        places = {int(client): row for row, client in enumerate(self.clients)}
        return [None if client is None else places.get(client) for client in clients]

    def of(self, clients: Sequence[int | None]) -> tuple[NDArray[np.int64], Rdp]:
        """Return releases (n,) and RDP (n, orders) of some clients; zeros for unknown ones."""
        releases, rdp = np.zeros(len(clients), np.int64), np.zeros((len(clients), len(ORDERS)))
        for i, row in enumerate(self.rows(clients)):
            if row is not None:
                releases[i], rdp[i] = self.releases[row], self.rdp[row]
        return releases, rdp

    def worst(self) -> Rdp:
        """Return (orders,) that no client exceeds at any order."""
        worst: Rdp = self.rdp.max(axis=0, initial=0.0)
        return worst
