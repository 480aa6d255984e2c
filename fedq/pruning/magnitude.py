"""Gradual magnitude pruning (Zhu and Gupta 2018, ICLR workshop, "To prune, or not to prune...")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.layout import Layout, Vector
from fedq.pruning.base import Pruning, Structure, Support
from fedq.registry import register


@register("pruning", "magnitude")
class Magnitude(Pruning):
    """The smallest weights of every layer are zero: on both ends, and in what is sent.

    The share rises by the cubic schedule, ``s(t) = s (1 - (1 - (t - begin) / (end - begin))^3)``
    between the rounds ``begin`` and ``end``, and stays. In each round the server and every client
    find the mask from the global model as it was sent, which all of them have to the bit, so that
    no mask is sent. Pruned weights are zero while clients train, and are no part of their updates.
    Among weights of one magnitude the first ones go.

    Args:
      sparsity: Share of zeros in the end, in [0, 1): of each layer's weights but the first and the
        last layer's, or of each layer's channels.
      unit: Single weights, by magnitude, or channels, by the Euclidean norm of their weights
        (Li et al. 2017, ICLR). Only channels that no residual connection passes on are pruned, and
        with them biases and normalisations, so that an export can leave them out.
      begin: The last round without pruning.
      end: The first round with all of it.

    Example:
      >>> [round(Magnitude(sparsity=0.8, begin=0, end=10).sparsity_at(t), 3) for t in (0, 1, 5, 20)]
      [0.0, 0.217, 0.7, 0.8]
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"begin": 0, "end": 1},
        {"sparsity": 0.5, "unit": "channel", "begin": 0, "end": 1},
    )

    sparsity: float = 0.8
    unit: Literal["weight", "channel"] = "weight"
    begin: int = 0
    end: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"pruning.sparsity must be in [0, 1), not {self.sparsity}")
        if not 0 <= self.begin < self.end:
            raise ConfigError(
                f"pruning needs 0 <= begin < end, not {self.begin} and {self.end}; they are rounds"
            )

    def sparsity_at(self, server_round: int) -> float:
        """Return the share of zeros in a round."""
        share = (server_round - self.begin) / (self.end - self.begin)
        return self.sparsity * (1 - (1 - min(max(share, 0.0), 1.0)) ** 3)

    def support(
        self, layout: Layout, structure: Structure, weights: Vector, server_round: int
    ) -> Support | None:
        """Return the largest weights, or what belongs to the channels of largest norm."""
        found = structure.weights if self.unit == "weight" else structure.groups
        if not found:
            what = "layer between the first and the last" if self.unit == "weight" else "channels"
            raise ConfigError(
                f"pruning.unit={self.unit} finds no {what} to prune in this model; choose another"
                " unit or model, or pruning=none"
            )
        share = self.sparsity_at(server_round)
        if share == 0:
            return None
        kept = {t.name: np.ones(t.shape, bool) for t in layout}
        values = layout.unflatten(weights)
        if self.unit == "weight":
            for name in structure.weights:
                kept[name] = _largest(np.abs(values[name]).reshape(-1), share).reshape(
                    values[name].shape
                )
        else:
            for group in structure.groups:
                rows = values[f"{group.layer}.weight"].astype(np.float64)
                stays = _largest(np.square(rows.reshape(len(rows), -1)).sum(1), share)
                for name in group.tensors:
                    kept[name][~stays] = False
                for name, block in group.consumers:
                    kept[name][:, ~np.repeat(stays, block)] = False
        flat = np.concatenate([kept[t.name].reshape(-1) for t in layout])
        return Support(layout, flat)


def _largest(size: NDArray[np.floating[Any]], share: float) -> NDArray[np.bool_]:
    """Return which entries stay if this share, rounded down, of the smallest go."""
    stays = np.ones(size.size, bool)
    stays[np.argsort(size, kind="stable")[: int(share * size.size)]] = False
    return stays
