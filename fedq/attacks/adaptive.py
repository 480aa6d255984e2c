"""Attacks tuned to the server, Shejwalkar and Houmansadr 2021 and Fang et al. 2020."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fedq.attacks.alie import Alie
from fedq.attacks.base import (
    Accomplice,
    Attack,
    Inputs,
    Labels,
    VectorAttack,
    View,
    deltas_of,
    encoded,
)
from fedq.codecs.base import decode
from fedq.errors import ConfigError
from fedq.random import generator
from fedq.registry import register


@register("attack", "adaptive")
class Adaptive(Attack):
    """Tune another attack's strength in every round on a simulation of the server.

    Attackers forge, encode, decode, and pass the result beside the honest replies through the
    server's own guard and rule; they send what serves them best: the aggregate that is farthest
    from the honest mean, or for backdoors nearest to their own model. Strengths from ``1 / span``
    to ``span`` times the inner attack's own are tried, first on a geometric grid, then between the
    neighbours of the best.

    Args:
      fraction: Of clients that are hostile; the inner attack's does not count.
      inner: The attack; its option ``z``, ``epsilon``, ``scale``, ``factor``, ``stretch`` or
        ``boost`` is tuned.
      span: How far from its own value.
      steps: Strengths tried on the grid, and again as many between.

    Reference:
      Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine", section IV (AGR-tailored);
      Fang et al. 2020, "Local model poisoning attacks to Byzantine-robust federated learning".
    """

    fraction: float = 0.2
    inner: VectorAttack = Alie()
    span: float = 30.0
    steps: int = 8

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"inner": "min_max"},
        {"inner": "ipm", "steps": 3},
        {"inner": "model_replacement"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.inner, VectorAttack) and self.inner.strength):
            raise ConfigError(
                "attack.inner must have a strength to tune, such as alie, ipm, min_max, sign_flip "
                f"or model_replacement, not {self.inner.name}"
            )
        if not 1 < self.span < 1e6:
            raise ConfigError(f"attack.span must be above 1, not {self.span}")
        if self.steps < 2:
            raise ConfigError(f"attack.steps must be at least 2, not {self.steps}")

    def poison(self, x: Inputs, y: Labels, client: Accomplice) -> tuple[Inputs, Labels]:
        """Return the inner attack's rows."""
        return self.inner.poison(x, y, client)

    def probe(
        self, x: Inputs, y: Labels, classes: int, high: float
    ) -> tuple[Inputs, Labels] | None:
        """Return the inner attack's probe."""
        return self.inner.probe(x, y, classes, high)

    def forge(self, view: View) -> list[bytes]:
        """Return the inner attack's messages at its best strength; as it is without a defence."""
        if view.defence is None:
            return self.inner.forge(view)
        return self.at(self.tuned(view)).forge(view)

    def at(self, times: float) -> VectorAttack:
        """Return the inner attack at so many times its own strength."""
        own = getattr(self.inner, self.inner.strength)
        value = times * (1.0 if own is None else own)
        tuned: VectorAttack = dataclasses.replace(self.inner, **{self.inner.strength: value})  # type: ignore[type-var]
        return tuned

    def tuned(self, view: View) -> float:
        """Return the best strength in a round, of the inner attack's own."""
        seed = int(view.rng.integers(2**63))
        tried: dict[float, float] = {}

        def best(exponents: np.ndarray[Any, Any]) -> float:
            for times in (self.span**exponents).tolist():
                tried[times] = self._harm(times, view, seed)
            return max(tried, key=lambda times: tried[times])

        grid = np.linspace(-1, 1, self.steps)
        middle = float(np.log(best(grid)) / np.log(self.span))
        gap = 2 / (self.steps - 1)
        return best(np.linspace(max(-1, middle - gap), min(1, middle + gap), self.steps + 2)[1:-1])

    def _harm(self, times: float, view: View, seed: int) -> float:
        """Return what one strength would do to the aggregate; with the same noise for all."""
        assert view.defence is not None
        attack, (own, others) = self.at(times), deltas_of(view)
        rows = np.broadcast_to(attack._deltas(own, others, generator(seed)), own.shape)
        forged = [
            decode(encoded(view, reply, row), view.layout)
            for reply, row in zip(view.own, rows, strict=True)
        ]
        honest = [reply.delta for reply in view.others or view.own]
        asked = [*view.own, *(view.others or view.own)]
        weights = [float(reply.message.metadata["examples"]) for reply in asked]
        result = view.defence.result(forged, honest, weights)
        return -np.inf if result is None else attack.harm(result, own, others)
