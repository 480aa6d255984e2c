"""Named tensors on one side, one flat float32 vector on the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def slice(self) -> slice:
        """The tensor's range in the flat vector."""
        return slice(self.start, self.start + self.size)

    @property
    def rows(self) -> int:
        """Output channels: the first dimension of a matrix or kernel, 1 for vectors."""
        return self.shape[0] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Layout:
    """The names and shapes of a model's tensors, in order: what both ends of a wire share.

    A decoder takes every size from its own layout, never from a payload.

    Example:
      >>> layout = Layout.of({"conv.weight": np.ones((4, 3)), "conv.bias": np.zeros(4)})
      >>> layout.size
      16
      >>> x = layout.flatten({"conv.weight": np.ones((4, 3)), "conv.bias": np.zeros(4)})
      >>> layout.unflatten(x)["conv.bias"]
      array([0., 0., 0., 0.], dtype=float32)
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes) or len(set(self.names)) != len(self.names):
            raise ConfigError("a layout needs one shape per name and distinct names")

    @classmethod
    def flat(cls, d: int) -> Layout:
        """Return the layout of one unnamed vector of ``d`` coordinates."""
        if d < 0:
            raise ConfigError(f"a layout needs d >= 0, not {d}")
        return cls(("x",), ((int(d),),))

    def copies(self, names: Sequence[str]) -> Layout:
        """Return the layout of several vectors of this layout behind each other; of one, itself.

        Example:
          >>> Layout.of({"lo": np.zeros(())}).copies(["w8", "w2"]).names
          ('w8.lo', 'w2.lo')
        """
        if len(names) == 1:
            return self
        return Layout(
            tuple(f"{copy}.{name}" for copy in names for name in self.names),
            self.shapes * len(names),
        )

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Layout:
        """Return the layout of named arrays (anything with a ``shape``), in their order."""
        return cls(
            tuple(arrays), tuple(tuple(int(n) for n in array.shape) for array in arrays.values())
        )

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors with their places in the flat vector."""
        result, start = [], 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            result.append(Tensor(name, shape, start, prod(shape)))
            start += prod(shape)
        return tuple(result)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    @cached_property
    def size(self) -> int:
        """Coordinates of the flat vector, d."""
        return sum(prod(shape) for shape in self.shapes)

    @cached_property
    def fingerprint(self) -> bytes:
        """Four bytes of SHA-256 over names and shapes: a mismatch is a mistake, not an attack."""
        text = ";".join(f"{n}:{s}" for n, s in zip(self.names, self.shapes, strict=True))
        return hashlib.sha256(text.encode()).digest()[:4]

    def flatten(self, arrays: Mapping[str, Any]) -> Vector:
        """Return the arrays as one (d,) float32 vector; names and shapes must match."""
        if set(arrays) != set(self.names):
            odd = sorted(set(arrays) ^ set(self.names))
            raise ConfigError(f"tensors do not match the layout: {', '.join(odd[:3])}")
        out = np.empty(self.size, np.float32)
        for tensor in self.tensors:
            array = np.asarray(arrays[tensor.name])
            if array.shape != tensor.shape:
                raise ConfigError(f"{tensor.name} has shape {array.shape}, expected {tensor.shape}")
            out[tensor.slice] = array.reshape(-1)
        return out

    def unflatten(self, x: Vector) -> dict[str, NDArray[np.float32]]:
        """Return named views of a (d,) vector."""
        if x.shape != (self.size,):
            raise ConfigError(f"expected a vector of shape ({self.size},), not {x.shape}")
        return {t.name: x[t.slice].reshape(t.shape) for t in self.tensors}
