"""The codes of a privacy mechanism as what a masked sum is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedq.errors import ConfigError
from fedq.layout import Vector
from fedq.privacy._distributed import Encoder
from fedq.privacy._entropy import Entropy
from fedq.secagg._grid import Aggregate, Integers
from fedq.secagg._words import Segment


@dataclass(frozen=True)
class Codes:
    """How updates become noisy integers, by a mechanism whose noise the clients add.

    Its codes are all that is masked: the state, the loss and a weight, which a
    :class:`fedq.secagg.Grid` has in a second part, have no noise, and stay on the device. The
    modulus is the mechanism's own, so the sum is what a trusted server would have added up.

    Args:
      encoder: Of the round.
    """

    encoder: Encoder

    def to_config(self) -> dict[str, Any]:
        """Return nothing: the request says what the mechanism is, and its digest is announced."""
        return {}

    def segments(self, clients: int, d: int, s: int) -> tuple[Segment, ...]:
        """Return the one part of a masked vector.

        Args:
          clients: Of the round.
          d: Coordinates of the update; the encoder knows them.
          s: Coordinates of the state, which is not sent.

        Raises:
          ConfigError: If the noise is shared among others than are in the sum.
        """
        if clients != self.encoder.cohort:
            raise ConfigError(
                f"noise for a sum of {self.encoder.cohort} clients does not protect one of "
                f"{clients}; the mechanism must be told the announced cohort"
            )
        return (Segment(self.encoder.count, self.encoder.bits),)

    def encode(self, delta: Vector, entropy: Entropy) -> list[Integers]:
        """Return a client's noisy codes.

        Args:
          delta: (d,) float32 update.
          entropy: Of rounding and noise; nobody else may know it.
        """
        return [self.encoder.encode(delta, entropy)]

    def decode(self, sums: Sequence[Integers], clients: int, s: int) -> Aggregate:
        """Return the sum of the codes of so many clients; s is the size of the state."""
        return Aggregate(sums[0], np.zeros(s, np.float32), None, clients)
