"""Series to forecast, one per column of a text file, as public energy and traffic sets have it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.data._forecast import Horizon
from fedq.data.base import Data, Dataset
from fedq.errors import ConfigError
from fedq.registry import register

_SEPARATORS = ";\t,"
_MISSING = frozenset({"", "?", "na", "nan", "null", "none"})


@register("data", "series_csv")
class SeriesCsv(Data):
    r"""Load a file of series: a row per time, a column per client.

    Values are separated by ``;``, tab or comma, which is told by the first line; beside ``;`` and
    tabs a decimal comma is read, too. A first line without numbers is a heading. Columns of text,
    such as dates, are left out. A missing value (empty, ``?``, ``NA``) is the one before it. So the
    files of UCI's electricity and household sets and of LSTNet's electricity, traffic and exchange
    rates load as they are, unpacked.

    Every series is standardised by its own training part; errors are in units of its deviation. The
    natural partition is by column. One example forecasts ``horizon`` steps from ``window`` steps.

    Args:
      path: The file.
      columns: Names in the heading, or numbers from 0, of the series; empty takes all that are
        numbers.
      every: Rows are averaged in groups of so many: 4 makes hours of quarters of an hour.
      window: Steps that a model sees.
      horizon: Steps that it forecasts.
      step: Between the starts of examples.
      season: Steps of a cycle, of the seasonal forecast reported beside; 0 for none.
      test_fraction: The last part of every series, held out.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
      ...     _ = file.write("time,a,b\n" + "".join(f"t{i},{i % 7},{i % 5}\n" for i in range(60)))
      ...     file.flush()
      ...     data = SeriesCsv(path=file.name, window=14, horizon=2, season=7).load()
      >>> data.input_shape, data.outputs, sorted(data.references)
      ((1, 14), 2, ['persistence_mae', 'seasonal_mae'])
    """

    path: str
    columns: tuple[str, ...] = ()
    every: int = 1
    window: int = 168
    horizon: int = 24
    step: int = 6
    season: int = 24
    test_fraction: float = 0.2

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __post_init__(self) -> None:
        _ = self._horizon
        if self.every < 1:
            raise ConfigError(f"data.every must be at least 1 row, not {self.every}")

    @property
    def _horizon(self) -> Horizon:
        return Horizon(
            window=self.window,
            horizon=self.horizon,
            step=self.step,
            season=self.season,
            test_fraction=self.test_fraction,
        )

    def load(self) -> Dataset:
        """Read the file."""
        names, columns = self._read()
        series = [_filled(column) for column in columns]
        kept = len(series[0]) // self.every * self.every
        try:
            return self._horizon.dataset(
                [values[:kept].reshape(-1, self.every).mean(1) for values in series], names
            )
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def _read(self) -> tuple[list[str], list[NDArray[np.float64]]]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ConfigError(f"data.path={self.path}: no such file")
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                first = file.readline()
                separator = next((s for s in _SEPARATORS if s in first), ",")
                decimal = "." if separator == "," else ","
                rows = csv.reader([first, *file], delimiter=separator)
                return self._columns([row for row in rows if row], decimal)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.path} is not a readable text file: {error}") from None

    def _columns(
        self, rows: list[list[str]], decimal: str
    ) -> tuple[list[str], list[NDArray[np.float64]]]:
        if not rows:
            raise ConfigError(f"{self.path} is empty")
        width = len(rows[0])
        names = [str(i) for i in range(width)]
        first = [_number(text, decimal) for text in rows[0]]
        if all(number is None or number != number for number in first) and None in first:
            names = [text.strip() or str(i) for i, text in enumerate(rows.pop(0))]
        for number, row in enumerate(rows):
            if len(row) != width:
                raise ConfigError(
                    f"{self.path}: row {number + 1} has {len(row)} values, the first has {width}"
                )
        chosen = list(self.columns) or names
        missing = [name for name in chosen if name not in names]
        if missing:
            raise ConfigError(
                f"{self.path} has no column {missing[0]}; it has {', '.join(names[:8])}"
            )
        found: dict[str, NDArray[np.float64]] = {}
        for name in chosen:
            place = names.index(name)
            values = _parsed((row[place] for row in rows), decimal)
            if values is not None:
                found[name] = values
            elif self.columns:
                raise ConfigError(f"{self.path}: column {name} is no series of numbers")
        if not found:
            raise ConfigError(f"{self.path} has no column of numbers below its heading")
        return list(found), list(found.values())


def _number(text: str, decimal: str) -> float | None:
    """Return a number, NaN for one that is missing, None for other text."""
    text = text.strip()
    if text.lower() in _MISSING:
        return float("nan")
    try:
        return float(text.replace(",", ".") if decimal == "," else text)
    except ValueError:
        return None


def _parsed(texts: Iterable[str], decimal: str) -> NDArray[np.float64] | None:
    """Return a column, NaN where values are missing; None if it is text, or holds no number."""
    numbers = []
    for text in texts:
        number = _number(text, decimal)
        if number is None or number in (float("inf"), float("-inf")):
            return None
        numbers.append(number)
    values = np.array(numbers, np.float64)
    return None if np.isnan(values).all() else values


def _filled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a column with missing values replaced by those before them, or the first one."""
    known = ~np.isnan(values)
    place = np.maximum.accumulate(np.where(known, np.arange(len(values)), 0))
    place[place < known.argmax()] = known.argmax()
    filled: NDArray[np.float64] = values[place]
    return filled
