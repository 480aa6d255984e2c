"""What rules with a trusted update share: the inner products with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Aggregator
from fedq.aggregators.blockwise import BLOCK_VALUES
from fedq.aggregators.median import Median
from fedq.errors import ConfigError
from fedq.layout import Vector


class Trusted(Aggregator):
    """A rule that judges updates by one of the server's own, trained on examples that it trusts.

    What is averaged but not trained has no direction to compare: it goes by the median.
    """

    root_examples: int

    def __post_init__(self) -> None:
        """Refuse a root data set without examples."""
        if self.root_examples < 1:
            raise ConfigError(
                f"aggregator.root_examples must be at least 1, not {self.root_examples}"
            )

    @property
    def trusted_examples(self) -> int:
        """``root_examples``."""
        return self.root_examples

    @property
    def for_state(self) -> Aggregator:
        """The median."""
        return Median()


def products(
    updates: NDArray[np.float32], reference: Vector
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``u_i . r`` and ``|u_i|**2``, both (n,), summed in float64."""
    n, d = updates.shape
    along, squares = np.zeros(n), np.zeros(n)
    step = max(1, BLOCK_VALUES // n)
    for start in range(0, d, step):
        block = updates[:, start : start + step].astype(np.float64)
        along += block @ reference[start : start + step].astype(np.float64)
        squares += np.einsum("ij,ij->i", block, block)
    return along, squares
