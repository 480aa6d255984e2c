"""What a pruning is, what it may prune, and the weights that it leaves."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.layout import Layout, Vector


@dataclass(frozen=True)
class Group:
    """The channels of one layer, with all that belongs to them.

    If the tensors' rows of a channel are zero, so is the channel, and it can be removed.

    Attributes:
      layer: The layer that computes them.
      tensors: Weights and biases with these channels as first dimension: the layer's, those of the
        batch normalisation behind it, and of a depthwise convolution that takes them on.
      consumers: Weights with these channels as second dimension, and how many columns each has.
    """

    layer: str
    tensors: tuple[str, ...]
    consumers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Structure:
    """What of a network may be pruned; see :func:`fedq.models.structure.structure`.

    Attributes:
      weights: Of dense and convolutional layers that are not depthwise, without the first and last.
      groups: Channels that can be removed.
    """

    weights: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, eq=False)
class Support:
    """The coordinates that a round trains; all others are zero.

    Attributes:
      full: The model's layout.
      kept: (d,) bool.
    """

    full: Layout
    kept: NDArray[np.bool_]

    @cached_property
    def layout(self) -> Layout:
        """What is sent: whole rows and columns keep a tensor's shape, else it becomes a vector."""
        shapes = {}
        for tensor in self.full:
            part = self.kept[tensor.slice].reshape(tensor.shape)
            axes = [
                part.any(tuple(j for j in range(part.ndim) if j != i)) for i in range(part.ndim)
            ]
            box = tuple(int(axis.sum()) for axis in axes)
            count = int(part.sum())
            if count:
                shapes[tensor.name] = box if count == np.prod(box, dtype=int) else (count,)
        return Layout(tuple(shapes), tuple(shapes.values()))

    @property
    def sparsity(self) -> float:
        """Share of all coordinates that are zero."""
        return 1 - float(self.kept.mean())

    def masked(self, x: Vector) -> Vector:
        """Return a (d,) vector with zeros where nothing is kept."""
        return np.where(self.kept, x, np.float32(0))

    def gather(self, x: Vector) -> Vector:
        """Return what is kept of a (d,) vector, in the order of :attr:`layout`."""
        return x[self.kept]

    def scatter(self, x: Vector) -> Vector:
        """Return the (d,) vector of what was kept; the inverse of :meth:`gather`."""
        full = np.zeros(self.kept.size, np.float32)
        full[self.kept] = x
        return full


class Pruning(abc.ABC):
    """A rule that server and clients follow alike: from the model as sent to what is trained of it.

    Laws: the support is a function of its arguments; of what it keeps it keeps the same again; a
    layer keeps at least one weight.
    """

    group: ClassVar[str] = "pruning"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Whether anything is ever pruned.
    active: ClassVar[bool] = True

    @abc.abstractmethod
    def support(
        self, layout: Layout, structure: Structure, weights: Vector, server_round: int
    ) -> Support | None:
        """Return what a round trains; None is everything.

        Args:
          layout: Of the weights.
          structure: Of the network.
          weights: (d,) float32, the global model as clients decode it.
          server_round: From 1.

        Raises:
          ConfigError: If the network has nothing that can be pruned so.
        """
