"""Temporal convolutions, causal and dilated (Bai, Kolter and Koltun 2018, arXiv:1803.01271)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fedq.errors import ConfigError
from fedq.models.base import Model
from fedq.registry import register


@register("model", "tcn")
class Tcn(Model):
    """Residual blocks of two causal convolutions each, whose dilation doubles from block to block.

    As many blocks as the last step needs to see the whole series, and a dense layer on that step.
    Without the paper's weight normalisation and dropout: small networks need neither, and there is
    nothing to fold. 9,128 parameters for a week of hours and the next day.

    Args:
      width: Channels of every convolution.
      kernel: Length of every kernel, in samples.

    Example:
      >>> from fedq.models.base import count_parameters, create
      >>> count_parameters(create(Tcn(), (1, 168), 24))
      9128
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"width": 4}, {"width": 4, "kernel": 2})

    width: int = 16
    kernel: int = 3

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"model.width must be at least 1, not {self.width}")
        if self.kernel < 2:
            raise ConfigError(f"model.kernel must be at least 2, not {self.kernel}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for series (C, T) of at least 2 samples."""
        self._check(input_shape, dimensions=2, smallest=2)
        channels, length = input_shape
        blocks: list[nn.Module] = []
        seen = 1
        while seen < length:
            dilation = 2 ** len(blocks)
            blocks.append(_Block(channels, self.width, self.kernel, dilation))
            channels = self.width
            seen += 2 * (self.kernel - 1) * dilation
        return _Tcn(nn.Sequential(*blocks), nn.Linear(self.width, classes))


class _Tcn(nn.Module):
    def __init__(self, blocks: nn.Module, fc: nn.Module) -> None:
        super().__init__()
        self.blocks, self.fc = blocks, fc

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.blocks(x)[..., -1])
        return out


class _Block(nn.Module):
    """Two causal convolutions beside a shortcut; zeros stand before the series."""

    def __init__(self, channels: int, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        past = dilation * (kernel - 1)
        self.pad1, self.pad2 = nn.ZeroPad1d((past, 0)), nn.ZeroPad1d((past, 0))
        self.conv1 = nn.Conv1d(channels, width, kernel, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, kernel, dilation=dilation)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Identity() if channels == width else nn.Conv1d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.conv1(self.pad1(x)))
        out = self.relu2(self.conv2(self.pad2(out)))
        total: Tensor = self.relu3(out + self.shortcut(x))
        return total
