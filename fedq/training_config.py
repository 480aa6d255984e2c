"""How a client trains: what the server decides and every message carries; no torch."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from fedq import registry
from fedq.errors import ConfigError, unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a client trains: stochastic gradient descent, started afresh each round.

    The gradient of a step is that of the batch's mean loss, plus ``proximal_mu (w - w_0)`` (the
    proximal term of FedProx), scaled down to norm ``max_grad_norm`` if longer, plus
    ``weight_decay w``; then ``v = momentum v + gradient`` and ``w = w - learning_rate v``, as in
    ``torch.optim.SGD``.

    Args:
      local_epochs: Passes over the client's examples per round.
      batch_size: Examples per step; the last batch of an epoch may be smaller, but a
        network with batch normalisation skips a last batch of one.
      learning_rate: Step size.
      momentum: Heavy-ball momentum, in [0, 1); 0 is plain SGD.
      weight_decay: L2 penalty's gradient factor.
      proximal_mu: Pull towards the weights received from the server; 0 is FedAvg.
      max_grad_norm: Bound on the gradient's Euclidean norm; 0 is no bound.
      adversarial_eps: Train on inputs that an attacker moved by at most this much in every
        coordinate, in units of the network's inputs; 0 is off.
      adversarial_steps: Gradients that the attacker has; each costs as much as a step's own.
      trades_beta: Weight of the divergence between the answers to plain and to moved inputs, beside
        the loss of plain ones (TRADES); 0 is the loss of the moved ones alone (PGD training).

    Reference:
      McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
      data", AISTATS, algorithm 1; Li et al. 2020, "Federated optimization in heterogeneous
      networks", MLSys, section 3 (FedProx). Adversarial training: see :mod:`fedq.adversarial`.

    Example:
      >>> TrainingConfig.from_config({"learning_rate": 0.1}).to_config()["learning_rate"]
      0.1
    """

    local_epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    max_grad_norm: float = 0.0
    adversarial_eps: float = 0.0
    adversarial_steps: int = 7
    trades_beta: float = 0.0

    def __post_init__(self) -> None:
        for option in ("local_epochs", "batch_size", "adversarial_steps"):
            if getattr(self, option) < 1:
                raise ConfigError(f"{option} must be at least 1, not {getattr(self, option)}")
        for option in (
            *("learning_rate", "weight_decay", "proximal_mu", "max_grad_norm"),
            *("adversarial_eps", "trades_beta"),
        ):
            if not 0 <= getattr(self, option) < math.inf:
                raise ConfigError(
                    f"{option} must be finite and not negative, not {getattr(self, option)}"
                )
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), not {self.momentum}")
        if self.trades_beta and not self.adversarial_eps:
            raise ConfigError("trades_beta needs adversarial_eps above 0")

    def to_config(self) -> dict[str, Any]:
        """Return the JSON-ready fields; those of an attacker only if there is one."""
        plain = dataclasses.asdict(self)
        if not self.adversarial_eps:
            for option in ("adversarial_eps", "adversarial_steps", "trades_beta"):
                del plain[option]
        return plain

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrainingConfig:
        """Build from a mapping of fields; the inverse of :meth:`to_config`.

        Raises:
          ConfigError: For an unknown field, or a value of the wrong type or range.
        """
        kinds = _options()
        for key in config:
            if key not in kinds:
                raise unknown("training option", key, kinds)
        return cls(**{key: registry.convert(config[key], kinds[key], key) for key in config})


@cache
def _options() -> dict[str, Any]:
    """Return the type of each option; to resolve them costs more than a small client's step."""
    return typing.get_type_hints(TrainingConfig)
