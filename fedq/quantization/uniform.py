"""Uniform integers (Jacob et al. 2018, CVPR, "Quantization and training of neural networks...")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fedq.errors import ConfigError
from fedq.quantization.activations.range import Range
from fedq.quantization.base import Quantization
from fedq.quantization.qat import Qat
from fedq.quantization.weights.linear import Linear
from fedq.registry import register


@register("quantization", "uniform")
class Uniform(Quantization):
    """Integer weights and activations, as int8 kernels of microcontrollers and phones compute.

    The short form of ``qat`` with weights ``linear`` and activations ``range``: symmetric weights
    with the largest at the end of the grid, asymmetric activations over a range that follows the
    batches': two float32 buffers ``activation_quantizers.NAME.lo`` and ``.hi`` each, zero while
    unset.

    Args:
      weight_bits: 2 to 8.
      activation_bits: 4 to 8; 0 leaves activations in float. The input and the logits have 8.
      per_channel: One weight scale per output channel, or one per layer. Batch normalisation folds
        exactly only with the former.
      first_last_bits: Weight bits of the first and the last layer, 2 to 8.
      depthwise_bits: Weight bits of depthwise convolutions, 2 to 8.
      range_momentum: How far an activation range shrinks towards each batch's, in (0, 1].

    Example:
      >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
      >>> prepared = Uniform(weight_bits=4).prepare(network)
      >>> [name for name in prepared.state_dict() if name not in network.state_dict()][:2]
      ['activation_quantizers.input.lo', 'activation_quantizers.input.hi']
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"weight_bits": 4, "activation_bits": 4},
        {
            "weight_bits": 2,
            "first_last_bits": 2,
            "depthwise_bits": 2,
            "per_channel": False,
            "activation_bits": 0,
        },
    )

    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    first_last_bits: int = 8
    depthwise_bits: int = 8
    range_momentum: float = 0.05

    def __post_init__(self) -> None:
        for option in ("weight_bits", "first_last_bits", "depthwise_bits"):
            if not 2 <= getattr(self, option) <= 8:
                raise ConfigError(
                    f"quantization.{option} must be 2 to 8, not {getattr(self, option)}"
                )
        if self.activation_bits != 0 and not 4 <= self.activation_bits <= 8:
            raise ConfigError(
                "quantization.activation_bits must be 4 to 8, or 0 for float activations,"
                f" not {self.activation_bits}"
            )
        if not 0 < self.range_momentum <= 1:
            raise ConfigError(
                f"quantization.range_momentum must be in (0, 1], not {self.range_momentum}"
            )

    def prepare(self, model: nn.Module, variant: int = 0) -> nn.Module:
        """Return the network with uniform fake quantizers."""
        return self.as_qat().prepare(model, variant)

    def as_qat(self) -> Qat:
        """Return the same quantization, spelled out."""
        weights = Linear(bits=self.weight_bits, per_channel=self.per_channel)
        activations = None
        if self.activation_bits:
            activations = Range(bits=self.activation_bits, momentum=self.range_momentum)
        return Qat(
            weights=weights,
            activations=activations,
            first_last=weights.at(self.first_last_bits),
            depthwise=weights.at(self.depthwise_bits),
        )
