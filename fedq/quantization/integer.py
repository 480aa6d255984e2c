"""What a fake quantizer means in integers: the seam between training and export.

Every weight quantizer ends on a grid (:class:`fedq.quantization.fake.Grid`), and only its multiples
count here, whatever made them: uniform, LSQ, ternary, powers of two, a codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedq.errors import ConfigError
from fedq.quantization.fake import SMALLEST_SCALE, WeightQuantizer

#: The narrow range of int8: closed under the sign of a batch normalisation's gain.
LARGEST = 127


@dataclass(frozen=True)
class IntegerGrid:
    """Integers ``smallest .. largest`` for reals: ``real = scale * (integer - zero_point)``."""

    scale: float
    zero_point: int
    smallest: int = -128
    largest: int = 127

    @property
    def bits(self) -> int:
        """Width of the integers."""
        return (self.largest - self.smallest).bit_length()


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight in int8 containers: ``values * scales`` by output channel.

    Attributes:
      values: int8 in the narrow range, output channels first.
      scales: (channels,) float64, positive.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float64]

    @property
    def bits(self) -> int:
        """The width that holds every value in two's complement, 2 to 8."""
        return max(2, self._largest.bit_length() + 1)

    @property
    def spread(self) -> int:
        """The largest whole number that the values can be multiplied by within the container."""
        return LARGEST // max(self._largest, 1)

    @property
    def _largest(self) -> int:
        return int(np.abs(self.values.astype(int)).max(initial=0))


def integer_weight(layer: nn.Module, path: str) -> IntegerWeight:
    """Return the integers that a layer's fake-quantized weight stands for.

    Each channel gets the coarsest step of which all its values are multiples, at most 127 of them.
    A channel of zeros gets the smallest scale.

    Args:
      layer: A layer with ``weight`` and ``weight_quantizer``.
      path: Its name in the network, for errors.

    Raises:
      ConfigError: If the weight is not finite, in float, or beyond 127 steps.

    Example:
      >>> from fedq.quantization.uniform import Uniform
      >>> network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
      >>> _ = network[0].weight.data.copy_(torch.tensor([[1.0, -0.4], [0.0, 0.0]]))
      >>> prepared = Uniform(first_last_bits=4).prepare(network)
      >>> integer_weight(prepared.get_submodule("0"), "0").values.tolist()
      [[7, -3], [0, 0]]
    """
    quantizer, weight = layer.weight_quantizer, layer.weight
    assert isinstance(quantizer, WeightQuantizer)
    assert isinstance(weight, torch.Tensor)
    if not torch.isfinite(weight).all():
        raise ConfigError(f"the weight of {path} holds NaN or infinity; train again")
    if not quantizer.enabled:
        raise ConfigError(
            f"the weight of {path} is in float and has no integer form; export with --quantization,"
            " or another --width"
        )
    grid = quantizer.grid(weight)
    multiples = grid.multiples().flatten(1).numpy()
    channels = len(multiples)
    common = np.gcd.reduce(multiples, axis=1)
    values = multiples // np.maximum(common, 1)[:, None]
    if np.abs(values).max(initial=0) > LARGEST:
        kind = type(quantizer).__name__
        raise ConfigError(
            f"the weight of {path} ({kind}) does not fit int8: it is {np.abs(values).max()} steps"
            f" of its scale, more than {LARGEST}; export a model of symmetric weights"
        )
    scale = grid.scale.double().flatten().expand(channels).numpy()
    scales = np.where(common > 0, scale * common, SMALLEST_SCALE)
    return IntegerWeight(values.astype(np.int8).reshape(tuple(weight.shape)), scales)


def activation_grid(quantizer: nn.Module, path: str) -> IntegerGrid:
    """Return the grid of an activation quantizer.

    A constant activation, which the fake quantizer passes as it is, gets the range from 0 to it:
    the constant is on that grid.

    Args:
      quantizer: Has ``qparams()``, ``smallest`` and ``largest``.
      path: Its name in the network, for errors.

    Raises:
      ConfigError: If its range is unset or not finite.
    """
    smallest, largest = int(quantizer.smallest), int(quantizer.largest)  # type: ignore[arg-type]
    qparams = quantizer.qparams()  # type: ignore[operator]
    if qparams is None:
        lo, hi = (float(getattr(quantizer, name, 0.0)) for name in ("lo", "hi"))
        if not math.isfinite(hi - lo):
            raise ConfigError(f"the activation range of {path} is not finite; train again")
        if lo == hi == 0:
            raise ConfigError(
                f"the activation range of {path} is unset: it never saw data, or nothing but"
                " zeros, or the run is private and its ranges stay on the clients; train for a"
                " round, or calibrate with --calibrate N"
            )
        levels = largest - smallest
        scale = max(float(np.float32(abs(hi) / levels)), SMALLEST_SCALE)
        qparams = scale, smallest if hi > 0 else largest
    return IntegerGrid(float(qparams[0]), int(qparams[1]), smallest, largest)
