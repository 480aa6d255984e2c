"""No attack: all clients are honest."""

from __future__ import annotations

from typing import ClassVar

from fedq.attacks.base import Attack
from fedq.registry import register


@register("attack", "none")
class NoAttack(Attack):
    """All clients are honest."""

    fraction: ClassVar[float] = 0.0  # type: ignore[misc]
