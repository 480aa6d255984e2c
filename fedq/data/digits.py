"""1,797 handwritten digits of 8 x 8, Alpaydin and Kaynak 1998, https://doi.org/10.24432/C50P49."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fedq.data.base import Data, Dataset, stratified
from fedq.errors import ConfigError
from fedq.registry import register


@register("data", "digits")
class Digits(Data):
    """Load scikit-learn's digits (Alpaydin and Kaynak 1998): small enough for tests.

    1,438 training and 359 test images, (8, 8) uint8, 10 classes; grey levels 0..16 are spread over
    0..255. The split is stratified and depends on ``seed`` alone.

    Args:
      seed: Chooses the test images; the run's seed does not.

    Example:
      >>> Digits().load().input_shape
      (1, 8, 8)

    Reference:
      Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI repository.
    """

    seed: int = 0

    def load(self) -> Dataset:
        """Read the table of the installed package."""
        spec = find_spec("sklearn")  # importing it takes seconds
        if spec is None or spec.origin is None:
            raise ConfigError("data=digits needs scikit-learn: pip install scikit-learn")
        path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        try:
            table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        except (OSError, ValueError) as error:
            remedy = "pip install --force-reinstall scikit-learn"
            raise ConfigError(f"data=digits cannot read {path}: {error}; {remedy}") from None
        x = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        y = table[:, -1].astype(np.int64)
        train, test = stratified(y, 0.2, self.seed)
        return Dataset.of(x[train], y[train], x[test], y[test], kind="image")
