"""Is there a face? 200 patches of LFW that ship in scikit-image (Huang et al. 2007)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from fedq.data.base import Data, Dataset, check_fraction, stratified
from fedq.errors import ConfigError
from fedq.registry import register


@register("data", "faces")
class Faces(Data):
    """Load 100 grey patches of faces and 100 without, (25, 25), enlarged without smoothing.

    It has visual wake words' question, a person or none, but neither its size nor its difficulty:
    so few patches are for tests and for a first try, and not for claims. The real set is
    ``data=folder`` with ``size=96``.

    Args:
      size: Pixels of both sides.
      test_fraction: Held out from either class.
      seed: Chooses the patches held out; the run's seed does not.

    Example:
      >>> Faces(size=96).test_fraction
      0.3

    Reference:
      Huang et al. 2007, "Labeled faces in the wild"; the patches without faces are of the same
      photographs' background.
    """

    size: int = 64
    test_fraction: float = 0.3
    seed: int = 0

    # Needs an extra, so that the law suite cannot count on it.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 512:
            raise ConfigError(f"data.size must be 8 to 512 pixels, not {self.size}")
        check_fraction(self.test_fraction, "data.test_fraction")

    def load(self) -> Dataset:
        """Read the patches of the installed package."""
        if find_spec("skimage") is None:
            raise ConfigError("data=faces needs scikit-image: pip install -e '.[data-faces]'")
        from skimage.data import lfw_subset

        shades = np.asarray(lfw_subset())  # type: ignore[no-untyped-call]
        patches = np.rint(255 * shades).astype(np.uint8)
        place = np.arange(self.size) * patches.shape[1] // self.size
        x = patches[:, place][:, :, place]
        y = np.repeat(["face", "none"], len(x) // 2)
        train, test = stratified(y, self.test_fraction, self.seed)
        return Dataset.of(x[train], y[train], x[test], y[test], kind="image")
