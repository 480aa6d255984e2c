"""Normalisation in a federation: statistics shared, local, frozen, or none at all."""

from __future__ import annotations

from typing import Any, Literal, Self

from torch import nn

#: ``batch``: statistics are averaged. ``local``: every client keeps its own (FedBN). ``frozen``:
#: statistics stay as built or loaded. ``group``: none are needed (Wu and He 2018).
Norm = Literal["batch", "local", "frozen", "group"]
_GROUPS = 8


class LocalBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation whose gains, shifts and statistics a client keeps between rounds.

    They are sent and averaged nevertheless: the mean serves devices that never trained.

    Reference:
      Li et al. 2021, "FedBN: federated learning on non-IID features via local batch
      normalization", ICLR.
    """

    local = True  #: the trainer keeps what is in modules that say so


class LocalBatchNorm2d(nn.BatchNorm2d):
    """See :class:`LocalBatchNorm1d`."""

    local = True


class _Frozen(nn.Module):
    """A module that is always in evaluation mode."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)  # the batch normalisation's
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """Batch normalisation by its running statistics in training, too; gains and shifts train."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """See :class:`FrozenBatchNorm1d`."""


LOCAL = (LocalBatchNorm1d, LocalBatchNorm2d)
FROZEN = (FrozenBatchNorm1d, FrozenBatchNorm2d)
_KINDS: dict[str, tuple[Any, Any]] = {
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d),
    "local": LOCAL,
    "frozen": FROZEN,
}


def norm_layer(norm: Norm, channels: int, dimensions: int) -> nn.Module:
    """Return a normalisation of so many channels.

    Args:
      norm: Which.
      channels: Of the input.
      dimensions: 1 for series, 2 for images.

    Example:
      >>> norm_layer("group", 12, 2).num_groups
      6
    """
    if norm == "group":
        groups = next(n for n in range(_GROUPS, 0, -1) if channels % n == 0)
        return nn.GroupNorm(groups, channels)
    made: nn.Module = _KINDS[norm][dimensions - 1](channels)
    return made
