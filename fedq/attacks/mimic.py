"""Mimic, Karimireddy et al. 2022, https://arxiv.org/abs/2006.09365."""

from __future__ import annotations

import numpy as np

from fedq.attacks.base import Rows, VectorAttack
from fedq.registry import register


@register("attack", "mimic")
class Mimic(VectorAttack):
    """All send a copy of one honest update: the farthest along the direction of most variance.

    Nothing about it is unusual, but one client's data count as many clients'. The paper follows one
    victim over rounds; here it is chosen anew in each (Karimireddy et al. 2022, section 3.2).

    Args:
      fraction: Of clients that are hostile.

    Reference:
      Karimireddy et al. 2022, "Byzantine-robust learning on heterogeneous datasets via bucketing".
    """

    fraction: float = 0.2

    def _deltas(self, own: Rows, others: Rows, rng: np.random.Generator) -> Rows:
        rows = others if len(others) else own
        centred = rows - rows.mean(axis=0)
        _, vectors = np.linalg.eigh(centred @ centred.T)
        return np.asarray(rows[np.argmax(np.abs(vectors[:, -1]))])
