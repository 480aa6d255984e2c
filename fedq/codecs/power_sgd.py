"""PowerSGD: low-rank factors by subspace iteration (Vogels et al. 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import random
from fedq.codecs._groups import cuts, floats_bytes, read_floats, read_scales, to_float32
from fedq.codecs._product import accumulate
from fedq.codecs.base import Codec
from fedq.errors import ConfigError, DecodeError
from fedq.jit import jit
from fedq.layout import Layout, Tensor, Vector
from fedq.registry import register

Matrix = NDArray[np.float32]


@register("codec", "power_sgd")
class PowerSgd(Codec):
    """Send matrices as ``P Q^T`` of rank r, and other tensors as they are.

    Kernels are matrices of one row per output channel. From a random Q of r columns, each
    iteration takes ``P = M Q``, makes its columns orthonormal, and takes ``Q = M^T P``. The result
    is M projected on the columns of P: biased, so meant inside ``error_feedback``. Where factors
    would take more numbers than M has, M goes as it is. Unlike the paper, a fresh Q is drawn from
    the seed each time: nobody keeps the last one.

    Body: float32 per low-rank tensor its largest magnitude m, P, and Q of ``M / m``, all by rows;
    per other tensor its values.

    Args:
      rank: r, 1 to 256.
      iterations: Of the subspace; the paper takes 1 from a warm start.

    Example:
      >>> layout = Layout.of({"w": np.empty((30, 40)), "b": np.empty(30)})
      >>> a, b = np.sin(np.arange(30)), np.cos(np.arange(40))
      >>> x = np.concatenate([np.outer(a, b).ravel(), a])
      >>> payload = PowerSgd(rank=1).encode(x, layout)
      >>> len(payload), bool(np.abs(PowerSgd().decode(payload, layout) - x).max() < 1e-5)
      (427, True)

    Reference:
      Vogels et al. 2019, "PowerSGD: practical low-rank gradient compression for distributed
      optimization", algorithm 1.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"rank": 2, "iterations": 1})

    rank: int = 1
    iterations: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 256:
            raise ConfigError(f"codec.rank must be from 1 to 256, not {self.rank}")
        if not 1 <= self.iterations <= 16:
            raise ConfigError(f"codec.iterations must be from 1 to 16, not {self.iterations}")

    @property
    def unbiased(self) -> bool:
        """False: what is not in the columns of P is lost."""
        return False

    def _numbers(self, tensor: Tensor) -> int:
        """Return the numbers of m, P and Q, or 0 where the tensor goes as it is."""
        rows, columns = _shape(tensor)
        count = 1 + self.rank * (rows + columns)
        return count if count < tensor.size else 0

    def max_body_bytes(self, layout: Layout) -> int:
        """Four bytes per number; no payload is shorter."""
        return 4 * sum(self._numbers(tensor) or tensor.size for tensor in layout)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        parts = []
        for index, tensor in enumerate(layout):
            values = x[tensor.slice]
            if self._numbers(tensor):
                parts += self._factors(values.reshape(_shape(tensor)), seed, index)
            else:
                parts.append(values)
        return b"".join(floats_bytes(part) for part in parts)

    def _factors(self, matrix: Matrix, seed: int, index: int) -> list[Matrix]:
        columns = matrix.shape[1]
        size = np.abs(matrix).max()
        unit = np.ascontiguousarray(matrix / (size if size > 0 else np.float32(1)))
        across = np.ascontiguousarray(unit.T)
        start = random.uniform(seed, columns * self.rank, f"power_sgd/{index}")
        q = start.reshape(columns, self.rank) - np.float32(0.5)
        for _ in range(self.iterations):
            p = _product(unit, q)
            _orthonormalise(p)
            q = _product(across, p)
        return [np.array([size]), p, q]

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        y = np.empty(layout.size, np.float32)
        for tensor in layout:
            if not self._numbers(tensor):
                y[tensor.slice], body = read_floats(body, tensor.size)
                continue
            rows, columns = _shape(tensor)
            (size,), body = read_scales(body, 1)
            p, body = read_floats(body, rows * self.rank)
            q, body = read_floats(body, columns * self.rank)
            if np.abs(p).max() > 2 or (size == 0 and q.any()):
                raise DecodeError("a factor is out of range")
            across = np.ascontiguousarray(q.reshape(columns, self.rank).T)
            unit = _product(p.reshape(rows, self.rank), across)
            flat, out = unit.reshape(-1), y[tensor.slice]
            for part in cuts(tensor.size):
                out[part] = to_float32(flat[part] * np.float64(size))
        if len(body):
            raise DecodeError(f"{len(body)} bytes too many")
        return y


def _shape(tensor: Tensor) -> tuple[int, int]:
    return tensor.rows, tensor.size // max(tensor.rows, 1)


def _product(p: Matrix, q: Matrix) -> Matrix:
    out = np.zeros((p.shape[0], q.shape[1]), np.float32)
    accumulate(p, q, out)
    return out


@jit
def _orthonormalise(p):  # type: ignore[no-untyped-def]
    """Make columns orthonormal in turn (Gram-Schmidt); one that depends on others becomes zero."""
    rows, rank = p.shape
    for k in range(rank):
        before = 0.0
        for i in range(rows):
            before += np.float64(p[i, k]) * np.float64(p[i, k])
        for j in range(k):
            overlap = 0.0
            for i in range(rows):
                overlap += np.float64(p[i, k]) * np.float64(p[i, j])
            for i in range(rows):
                p[i, k] = np.float32(p[i, k] - overlap * p[i, j])
        power = 0.0
        for i in range(rows):
            power += np.float64(p[i, k]) * np.float64(p[i, k])
        # What is left of a dependent column is rounding noise.
        length = np.sqrt(power) if power > 1e-12 * before else 0.0
        for i in range(rows):
            p[i, k] = np.float32(p[i, k] / length) if length > 0 else np.float32(0)
