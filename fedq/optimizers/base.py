"""What every server optimiser is: a pure step on weights, aggregated update and named state."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Vector

State = dict[str, NDArray[np.float32]]
Double = NDArray[np.float64]


class ServerOptimizer(abc.ABC):
    """How the server moves the global model by an aggregated update (Reddi et al. 2021, FedOpt).

    The update is the aggregate of client deltas, new minus old weights: a descent direction to be
    *added*. All state is named float32 arrays, so that any checkpoint can hold it. Subclasses are
    registered frozen dataclasses that implement :meth:`_step` in float64.
    """

    group: ClassVar[str] = "server_optimizer"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def init(self, d: int) -> State:
        """Return the state before the first step: named (d,) float32 arrays."""
        return {}

    @abc.abstractmethod
    def _step(
        self, weights: Double, update: Double, state: Mapping[str, Double]
    ) -> tuple[Double, dict[str, Double]]:
        """Return new weights and state; may write to its arguments."""

    def step(
        self, weights: Vector, update: Vector, state: Mapping[str, NDArray[np.float32]]
    ) -> tuple[Vector, State]:
        """Apply one aggregated update.

        Args:
          weights: (d,) float32, the global model; not written to.
          update: (d,) float32, the aggregated client delta; not written to.
          state: What :meth:`init` or the previous step returned; not written to.

        Returns:
          New weights, (d,) float32, and new state. Arithmetic is float64, rounded once.

        Raises:
          ConfigError: If shapes or dtypes differ, the update or the result is not finite, or the
            state is another optimiser's.
        """
        arrays = {"weights": weights, "update": update, **state}
        for key, array in arrays.items():
            if array.dtype != np.float32 or array.shape != (weights.size,):
                raise ConfigError(
                    f"{key} must be float32 of shape ({weights.size},), "
                    f"not {array.dtype} of shape {array.shape}"
                )
        if set(state) != set(self.init(0)):
            raise ConfigError(
                f"server_optimizer={self.name} keeps {sorted(self.init(0)) or 'no state'}, "
                f"not {sorted(state)}; resume with the optimiser of the checkpoint"
            )
        if not np.isfinite(update).all():
            raise ConfigError("the aggregated update holds NaN or infinity")
        doubles = {key: array.astype(np.float64) for key, array in state.items()}
        moved, after = self._step(weights.astype(np.float64), update.astype(np.float64), doubles)
        with np.errstate(over="ignore"):
            result = moved.astype(np.float32)
            new = {key: array.astype(np.float32) for key, array in after.items()}
        if not all(np.isfinite(array).all() for array in (result, *new.values())):
            raise ConfigError(
                f"server_optimizer={self.name} left the range of float32; "
                "lower server_optimizer.learning_rate"
            )
        return result, new


def check_positive(value: float, option: str) -> None:
    """Raise :class:`ConfigError` unless ``value`` is finite and greater than 0."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"server_optimizer.{option} must be positive, not {value}")


def check_decay(value: float, option: str) -> None:
    """Raise :class:`ConfigError` unless ``value`` lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"server_optimizer.{option} must lie in [0, 1), not {value}")
