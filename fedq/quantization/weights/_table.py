"""Levels that are not equidistant, as small integers times a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedq.quantization.fake import Grid, straight_through
from fedq.quantization.weights._clips import ClippedWeight
from fedq.quantization.weights.base import largest_magnitude, positive


class TableWeight(ClippedWeight):
    """The nearest of ``+-levels`` times a scale, borders at the arithmetic midpoints.

    Args:
      bits: Width in storage.
      levels: Whole numbers from 0 to 127, ascending: the magnitudes, in units of the scale.
      per_channel: One scale per output channel, or one for the layer.
      search: Whether the top level is at the clip of least square error, or at the largest weight.
    """

    def __init__(self, bits: int, levels: Sequence[int], per_channel: bool, search: bool) -> None:
        super().__init__(bits, per_channel, search)
        self.levels = torch.tensor(levels, dtype=torch.float32)
        self.borders = (self.levels[1:] + self.levels[:-1]) / 2

    def grid(self, weight: Tensor) -> Grid:
        """Return integers and scale."""
        weight = weight.detach()
        scale = self._scale(weight, self.best(weight) if self.search else 1.0)
        return Grid(self._nearest(weight, scale).to(torch.int8), scale)

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight; the gradient is passed straight through."""
        held = weight.detach()
        return straight_through(weight, self.clipped(held, self.share(held)))

    def clipped(self, weight: Tensor, share: Tensor | float) -> Tensor:
        """Return the fake-quantized weight with the top level at a share of the largest."""
        scale = self._scale(weight, share)
        return self._nearest(weight, scale) * scale

    def _scale(self, weight: Tensor, share: Tensor | float) -> Tensor:
        return positive(largest_magnitude(weight, self.per_channel) * (share / self.levels[-1]))

    def _nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        steps = torch.nan_to_num(weight / scale)  # the scale keeps the NaN
        return self.levels[torch.bucketize(steps.abs(), self.borders)] * steps.sign()
