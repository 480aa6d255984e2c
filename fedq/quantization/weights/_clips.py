"""The clip of least square error, searched for now and then."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from fedq.quantization.fake import WeightQuantizer
from fedq.quantization.weights.base import by_channel

#: Clips that are tried, as shares of the largest magnitude.
CLIPS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.51, 0.44, 0.37, 0.3)
#: Training steps between two searches; the share moves slowly, the magnitude is always fresh.
EVERY = 10


class ClippedWeight(WeightQuantizer, abc.ABC):
    """A quantizer whose grid ends at a share of the largest magnitude.

    Args:
      bits: Width in storage.
      per_channel: One share per output channel, or one for the layer.
      search: Whether the share is searched for, or 1.
    """

    steps: Tensor

    def __init__(self, bits: int, per_channel: bool, search: bool) -> None:
        super().__init__(bits)
        self.per_channel = per_channel
        self.search = search
        self._share = torch.ones(())
        # An integer buffer, which the trainer sets back for every client.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    @abc.abstractmethod
    def clipped(self, weight: Tensor, share: Tensor | float) -> Tensor:
        """Return a new tensor: the fake-quantized weight at a share."""

    def observe(self, weight: Tensor) -> None:
        """Search for the share, now and then."""
        if self.search:
            if self.steps.item() % EVERY == 0:
                self._share = self.best(weight)
            self.steps += 1

    def share(self, weight: Tensor) -> Tensor | float:
        """Return the share at present, in training the one last found."""
        if not self.search:
            return 1.0
        return self._share if self.training else self.best(weight)

    @torch.no_grad()
    def best(self, weight: Tensor) -> Tensor:
        """Return the share of least square error, shape (channels, 1, ...) or ()."""
        best = error = None
        for share in CLIPS:
            squares = self.clipped(weight, share).sub_(weight).square_()
            if self.per_channel:
                now = by_channel(weight, squares.flatten(1).sum(1))
            else:
                now = squares.sum()
            if best is None or error is None:
                best, error = torch.full_like(now, share), now
            else:
                best, error = torch.where(now < error, share, best), now.minimum(error)
        assert best is not None
        return best
