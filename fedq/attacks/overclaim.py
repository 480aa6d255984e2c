"""Weight inflation: a claim of more examples than there are."""

from __future__ import annotations

from fedq.attacks.base import Honest, PayloadAttack, View, encoded, resealed
from fedq.errors import ConfigError
from fedq.registry import register


@register("attack", "overclaim")
class Overclaim(PayloadAttack):
    """Send the opposite of the own update and claim very many examples for it.

    A mean by examples follows whoever claims most, up to ``max_examples``; ``weighting=registered``
    holds a client to its first claim, ``uniform`` counts all alike.

    Args:
      fraction: Of clients that are hostile.
      claim: Examples.
    """

    fraction: float = 0.2
    claim: int = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.claim < 1:
            raise ConfigError(f"attack.claim must be at least 1, not {self.claim}")

    def _rewrite(self, reply: Honest, view: View) -> bytes:
        return resealed(reply, encoded(view, reply, -reply.delta), examples=self.claim)
