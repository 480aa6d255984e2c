"""Made-up hourly electricity of households: days, weeks, weather and habits, from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import random
from fedq.data._forecast import Horizon
from fedq.data.base import Data, Dataset
from fedq.errors import ConfigError
from fedq.registry import register


@register("data", "energy")
class Energy(Data):
    """Generate a year's quarter of hourly loads, one series per household.

    Real loads need a download (``data=series_csv``); this stands in for them in tests and presets.
    Each household has a base load, a morning and an evening peak at hours of its own, other habits
    at weekends, a share in the weather that all have in common (an AR(1) process of days),
    switching noise (an AR(1) process of hours), and rare absences of a few days. Loads are positive
    and skewed: the exponential of the sum.

    Args:
      households: Series, and clients of the natural partition.
      days: Length of each.
      window: Hours that a model sees.
      horizon: Hours that it forecasts.
      step: Hours between the starts of examples.
      test_fraction: The last part of every series, held out.
      seed: Of the generator; the run's seed does not count.

    Example:
      >>> data = Energy(households=3, days=30).load()
      >>> data.input_shape, data.outputs, data.references["seasonal_mae"] < 1
      ((1, 168), 24, True)
    """

    households: int = 20
    days: int = 90
    window: int = 168
    horizon: int = 24
    step: int = 6
    test_fraction: float = 0.2
    seed: int = 0

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"households": 3, "days": 40},)

    def __post_init__(self) -> None:
        _ = self._horizon
        if self.households < 1 or self.days < 1:
            raise ConfigError("data.households and data.days must be at least 1")

    @property
    def _horizon(self) -> Horizon:
        return Horizon(
            window=self.window,
            horizon=self.horizon,
            step=self.step,
            season=24 if self.window >= 24 else 0,
            test_fraction=self.test_fraction,
        )

    def load(self) -> Dataset:
        """Generate the loads and cut them."""
        weather = _autoregressive(
            random.generator(random.derive(self.seed, "weather")), self.days, 0.8
        )
        series = [
            _household(random.generator(random.derive(self.seed, number, "household")), weather)
            for number in range(self.households)
        ]
        return self._horizon.dataset(series, [str(number) for number in range(self.households)])


def _household(rng: np.random.Generator, weather: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the hourly load of one household, in kW."""
    hours = np.arange(24 * len(weather))
    hour, day = hours % 24, hours // 24
    weekend = day % 7 >= 5
    morning, evening = rng.normal(7.0, 1.0), rng.normal(19.0, 1.0)
    late = rng.uniform(0.5, 2.5)  # at weekends
    log_load = np.full(len(hours), rng.normal(-1.2, 0.4))
    for peak, height, shift in ((morning, 0.8, late), (evening, 1.4, 0.0)):
        distance = (hour - peak - shift * weekend + 12) % 24 - 12
        log_load += height * rng.uniform(0.6, 1.4) * np.exp(-((distance / 2.2) ** 2))
    log_load += rng.normal(0.25, 0.1) * weekend
    log_load += rng.normal(0.25, 0.1) * weather[day]
    log_load += 0.25 * _autoregressive(rng, len(hours), 0.6)
    away = np.zeros(len(weather), bool)
    for start in np.flatnonzero(rng.uniform(size=len(weather)) < 1 / 60):
        away[start : start + rng.integers(2, 6)] = True
    log_load[away[day]] = log_load.min() + 0.1 * rng.normal(size=int(away[day].sum()))
    load: NDArray[np.float64] = np.exp(log_load)
    return load


def _autoregressive(rng: np.random.Generator, steps: int, memory: float) -> NDArray[np.float64]:
    """Return a stationary AR(1) process of variance 1."""
    shocks = rng.normal(size=steps) * np.sqrt(1 - memory**2)
    values = np.empty(steps)
    values[0] = rng.normal()
    for t in range(1, steps):
        values[t] = memory * values[t - 1] + shocks[t]
    return values
