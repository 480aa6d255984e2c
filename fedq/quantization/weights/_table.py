"""Levels that are not equidistant, as small integers times a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedq.quantization.fake import Grid, WeightQuantizer
from fedq.quantization.weights.base import by_channel, largest_magnitude, positive


class TableWeight(WeightQuantizer):
    """The nearest of ``+-levels`` times a scale, borders at the arithmetic midpoints.

    The scale puts the top level at that share of the largest magnitude, of those in ``clips``,
    which has the least square error.

    Args:
      bits: Width in storage.
      levels: Whole numbers from 0 to 127, ascending: the magnitudes, in units of the scale.
      per_channel: One scale per output channel, or one for the layer.
      clips: Shares that are tried.
    """

    def __init__(
        self, bits: int, levels: Sequence[int], per_channel: bool, clips: Sequence[float]
    ) -> None:
        super().__init__(bits)
        self.levels = torch.tensor(levels, dtype=torch.float32)
        self.borders = (self.levels[1:] + self.levels[:-1]) / 2
        self.per_channel = per_channel
        self.clips = tuple(clips)

    def grid(self, weight: Tensor) -> Grid:
        """Return integers and scale."""
        weight = weight.detach()
        scale = self._scale(weight)
        return Grid(self._nearest(weight, scale).to(torch.int8), scale)

    def _scale(self, weight: Tensor) -> Tensor:
        largest = positive(largest_magnitude(weight, self.per_channel))
        best = error = None
        for share in self.clips:
            scale = positive(largest * (share / self.levels[-1]))
            if len(self.clips) == 1:
                return scale
            squares = (self._nearest(weight, scale) * scale).sub_(weight).square_()
            now = squares.sum()
            if self.per_channel:
                now = by_channel(weight, squares.flatten(1).sum(1))
            if best is None or error is None:
                best, error = scale, now
            else:
                best, error = torch.where(now < error, scale, best), now.minimum(error)
        assert best is not None
        return best

    def _nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        steps = torch.nan_to_num(weight / scale)  # the scale keeps the NaN
        return self.levels[torch.bucketize(steps.abs(), self.borders)] * steps.sign()
