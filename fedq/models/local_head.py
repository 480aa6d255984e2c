"""A head of each client's own on a shared body (Arivazhagan et al. 2019, FedPer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fedq.errors import ConfigError
from fedq.models.auto import Auto
from fedq.models.base import Model
from fedq.registry import register


@register("model", "local_head")
class LocalHead(Model):
    """Another model whose last dense layers clients keep between rounds.

    Heads are sent and averaged nevertheless, as local normalisations are: the mean serves devices
    that never trained, and it is what the run's accuracy is of.

    Args:
      inner: The model.
      layers: How many of its last dense layers are the head.

    Example:
      >>> from fedq.models.base import create
      >>> network = create(LocalHead(), (64,), 10)
      >>> [name for name, layer in network.named_modules() if getattr(layer, "local", False)]
      ['fc2']

    Reference:
      Arivazhagan et al. 2019, "Federated learning with personalization layers".
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"inner": {"name": "small_cnn", "width": 8}},
        {"inner": {"name": "mlp", "hidden": (16, 8)}, "layers": 2},
    )

    inner: Model = Auto()
    layers: int = 1

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"model.layers must be at least 1, not {self.layers}")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for whatever the inner model takes."""
        network = self.inner.build(input_shape, classes)
        dense = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        if len(dense) < self.layers:
            raise ConfigError(
                f"model.layers={self.layers}, but {self.inner.name} has {len(dense)} dense layers"
            )
        for layer in dense[-self.layers :]:
            setattr(layer, "local", True)  # noqa: B010 - torch types attributes as tensors
        return network
