"""No distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.distillation.base import Member, ServerDistillation
from fedq.layout import Vector
from fedq.pruning.base import Support
from fedq.registry import register

if TYPE_CHECKING:
    from fedq.training import Trainer


@register("server_distillation", "none")
class NoDistillation(ServerDistillation):
    """The aggregate is the model."""

    examples: ClassVar[int] = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        """There is nothing to check."""

    def refined(
        self,
        trainers: Sequence[Trainer],
        members: Sequence[Member],
        weights: Vector,
        state: Vector,
        x: NDArray[np.float32],
        seed: int,
        support: Support | None = None,
    ) -> tuple[Vector, Vector]:
        """Return weights and state as they are."""
        return weights, state
