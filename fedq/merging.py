"""How the state beside the weights is merged over clients: every entry by its own rule.

A rule is a mean in a domain of its own. So it is a sum, as exact aggregation, secure aggregation
and robust rules need it; a plain maximum would be none, and one client alone could set it.

========== ========================================== =================================
rule       merged value                               of
========== ========================================== =================================
`mean`     ``sum w_i x_i``                            ranges, offsets, centroids, batch
                                                      statistics
`log_mean` ``exp(sum w_i log|x_i|)``                  learned scales and clips: positive
========== ========================================== =================================
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedq.errors import ConfigError, unknown
from fedq.layout import Layout, Vector

RULES = ("mean", "log_mean")
#: Magnitudes below count as this one where logarithms are taken: 2**-100.
SMALLEST = np.float32(2.0**-100)


class Merger:
    """The change of domain in which the mean of states is taken.

    Args:
      layout: Names and shapes of the state.
      rules: One of :data:`RULES` per tensor; none at all are means.

    Example:
      >>> layout = Layout.of({"lo": np.zeros(1), "scale": np.zeros(1)})
      >>> merger = Merger(layout, ["mean", "log_mean"])
      >>> a, b = np.array([1, 0.25], np.float32), np.array([3, 4], np.float32)
      >>> merger.merged((merger.summand(a) + merger.summand(b)) / 2)
      array([2., 1.], dtype=float32)
    """

    def __init__(self, layout: Layout, rules: Sequence[str] = ()) -> None:
        rules = rules or ["mean"] * len(layout.names)
        if len(rules) != len(layout.names):
            raise ConfigError(f"need a merge rule for each of {len(layout.names)} tensors")
        for rule in rules:
            if rule not in RULES:
                raise unknown("merge rule", rule, RULES)
        self._logarithms = [
            tensor.slice for tensor, rule in zip(layout, rules, strict=True) if rule == "log_mean"
        ]

    def summand(self, state: Vector) -> Vector:
        """Return what a client adds to the mean, (s,) float32."""
        if not self._logarithms:
            return state
        state = state.copy()
        for part in self._logarithms:
            state[part] = np.log(np.maximum(np.abs(state[part]), SMALLEST))
        return state

    def merged(self, mean: Vector) -> Vector:
        """Return the merged state of a mean, (s,) float32."""
        if not self._logarithms:
            return mean
        mean = mean.copy()
        for part in self._logarithms:
            values = np.exp(mean[part])
            mean[part] = np.where(values <= 2 * SMALLEST, 0, values)  # unset stays unset
        return mean
