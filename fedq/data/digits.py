"""1,797 handwritten digits of 8 x 8, Alpaydin and Kaynak 1998, https://doi.org/10.24432/C50P49."""

from __future__ import annotations

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
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise ConfigError("data=digits needs scikit-learn: pip install scikit-learn") from None
        bunch = load_digits()
        x = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        y = bunch.target
        train, test = stratified(y, 0.2, self.seed)
        return Dataset.of(x[train], y[train], x[test], y[test], kind="image")
