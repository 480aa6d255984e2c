"""What every weight quantization is: a frozen configuration with one verb."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from fedq.errors import ConfigError
from fedq.quantization.fake import SMALLEST_SCALE, WeightQuantizer


class WeightScheme(abc.ABC):
    """A map from a weight to the module that fake-quantizes it.

    Laws: the module's output lies on at most ``2**bits`` levels, each a small integer times a scale
    (:class:`fedq.quantization.fake.Grid`); quantizing twice is quantizing once, where the scheme
    has a fixed grid; larger weights of a channel do not become smaller ones; NaN stays NaN.
    """

    group: ClassVar[str] = "weight_quantizer"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Widths that the scheme knows.
    supported: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    #: Whether zero is always a level: pruned weights stay pruned.
    has_zero: ClassVar[bool] = True
    #: Whether the state has one shape at all widths, so that clients of several can share one run.
    any_width: ClassVar[bool] = True
    #: Whether it is trained by the task's loss.
    learned: ClassVar[bool] = False

    bits: int

    @abc.abstractmethod
    def quantizer(self, weight: Tensor) -> WeightQuantizer:
        """Return the module for a weight of this shape, output channels first."""

    def at(self, bits: int) -> Self:
        """Return the scheme at another width."""
        return dataclasses.replace(self, bits=bits)  # type: ignore[type-var]

    def _check_bits(self) -> None:
        if self.bits not in self.supported:
            widths = ", ".join(map(str, self.supported))
            raise ConfigError(
                f"weight quantizer {self.name} has widths of {widths} bits, not {self.bits}"
            )


def by_channel(weight: Tensor, values: Tensor) -> Tensor:
    """Reshape values per output channel so that they broadcast over a weight.

    Example:
      >>> import torch
      >>> by_channel(torch.zeros(2, 3, 5), torch.ones(2)).shape
      torch.Size([2, 1, 1])
    """
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def largest_magnitude(weight: Tensor, per_channel: bool) -> Tensor:
    """Return the largest magnitude of each channel, or of all: shape (channels, 1, ...) or ()."""
    size = weight.detach().abs()
    return by_channel(weight, size.flatten(1).amax(1)) if per_channel else size.amax()


def positive(scale: Tensor) -> Tensor:
    """Return a scale that can be divided by, in place; NaN stays."""
    return scale.clamp_min_(SMALLEST_SCALE)
