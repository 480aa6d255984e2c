"""From series to examples of the past and what comes next; shared by the sources of series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.data.base import Dataset, check_fraction
from fedq.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """How series are cut.

    Args:
      window: Steps that a model sees.
      horizon: Steps that it forecasts.
      step: Between the starts of examples.
      season: Steps of a cycle, for the seasonal forecast that is reported beside; 0 for none.
      test_fraction: The last part of every series is the test set: whatever is forecast in it. What
        a test example sees may reach back into the training part.
    """

    window: int
    horizon: int
    step: int
    season: int
    test_fraction: float

    def __post_init__(self) -> None:
        for option in ("window", "horizon", "step"):
            if getattr(self, option) < 1:
                raise ConfigError(f"data.{option} must be at least 1, not {getattr(self, option)}")
        if not 0 <= self.season <= self.window:
            raise ConfigError(
                f"data.season must be 0 or up to data.window={self.window}, not {self.season}"
            )
        check_fraction(self.test_fraction, "data.test_fraction")

    def dataset(self, series: Sequence[NDArray[np.float64]], names: Sequence[str]) -> Dataset:
        """Return the data set of one client per series.

        Each series is standardised by mean and deviation of its own training part, so that errors
        are in units of that deviation and every client counts alike. ``references`` has the mean
        absolute errors of two forecasts that learn nothing: the last value stays (``persistence``),
        the last cycle repeats (``seasonal``).

        Args:
          series: (T,) each, finite.
          names: Of the series.

        Raises:
          ConfigError: If a series is too short, or constant in its training part.
        """
        parts: list[tuple[Any, Any, Any, Any, Any]] = []
        for number, (values, name) in enumerate(zip(series, names, strict=True)):
            cut = len(values) - round(self.test_fraction * len(values))
            least = self.window + self.horizon
            if cut < least or len(values) - cut < self.horizon:
                raise ConfigError(
                    f"series '{name}' has {cut} training and {len(values) - cut} test steps; "
                    f"data.window and data.horizon need {least} and {self.horizon}"
                )
            mean, deviation = values[:cut].mean(), values[:cut].std()
            if not deviation > 1e-9 * abs(mean):
                raise ConfigError(f"series '{name}' is constant in its training part; leave it out")
            standard = ((values - mean) / deviation).astype(np.float32)
            train, test = standard[:cut], standard[cut - self.window :]
            pieces = *self._examples(train), *self._examples(test)
            parts.append((*pieces, np.full(len(pieces[0]), number)))
        x, y, x_test, y_test, clients = map(np.concatenate, zip(*parts, strict=True))
        return Dataset.of(
            x[..., None],
            y,
            x_test[..., None],
            y_test,
            kind="series",
            client_train=clients,
            task="regression",
            references=self._references(x_test, y_test),
        )

    def _examples(
        self, values: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return (n, window) of the past and (n, horizon) of what comes next."""
        views = np.lib.stride_tricks.sliding_window_view(values, self.window + self.horizon)
        both = views[:: self.step]
        return both[:, : self.window], both[:, self.window :]

    def _references(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> dict[str, float]:
        found = {"persistence_mae": float(np.abs(x[:, -1:] - y).mean(dtype=np.float64))}
        if self.season:
            places = np.arange(self.horizon) % self.season - self.season
            found["seasonal_mae"] = float(np.abs(x[:, places] - y).mean(dtype=np.float64))
        return found
