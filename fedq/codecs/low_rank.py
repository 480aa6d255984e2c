"""Low-rank prediction of updates (as PowerSGD, Vogels et al. 2019), with the rest coded as well."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq import random, wire
from fedq.codecs import _range
from fedq.codecs._product import accumulate
from fedq.codecs._rate import Goal, RateCodec, SteppedCodec
from fedq.codecs._scales import Profile
from fedq.codecs.base import Codec
from fedq.codecs.dtcq import DTCQ
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Tensor, Vector
from fedq.registry import register

Matrix = NDArray[np.float32]

_SMALLEST = 2048  # coordinates of a matrix that may have a predictor
_NARROWEST = 4
_OVERSAMPLING = 8
#: Steps that factors may have, as multiples of that of the rest.
_WIDTHS = (0.5, 1.0, 2.0, 4.0)
_LIMIT = 1 << 24
#: What a bit is worth in squares of the step; found on updates, between both kinds of rest.
_WORTH = 0.2


@register("codec", "low_rank")
class LowRank(RateCodec):
    """Send the leading singular vectors of each matrix, coarsely, and what they leave by ``inner``.

    Updates of a few steps of SGD are nearly of low rank. With ``x ~ sum_j u_j s_j v_j``, the
    factors ``u_j s_j`` and ``v_j s_j`` are rounded on a common grid, which spends bits as reverse
    water-filling would; then ``x - sum`` goes through ``inner``. The prediction depends on ``x``
    alone, so that the sum of both is unbiased if ``inner`` is. Each tensor's rank is the one of the
    least expected error plus bits, from the scales of what it leaves.

    Body: step, float32; length, varint, and the factors: per matrix its rank and which of four
    multiples of the step they are rounded to, u8 each; then a range code of the values ``s_j``, as
    the upper half of a float32, and of the factors. Then the body of ``inner``.

    Args:
      bits: Target in bits per parameter, header included.
      nmse: Target of ``E|y - x|^2 / |x|^2``; takes the place of ``bits``.
      step: The step of ``inner``; takes the place of both.
      rank: At most; 0 sends no factors.
      inner: Codec of what is left, with a step; its own targets are not used.

    Example:
      >>> layout, rng = Layout(("w",), ((64, 100),)), np.random.default_rng(0)
      >>> x = np.outer(rng.standard_normal(64), rng.standard_normal(100)).ravel().astype(np.float32)
      >>> codec = LowRank(bits=1.0)
      >>> payload = codec.encode(x, layout, seed=1)
      >>> error = codec.decode(payload, layout) - x
      >>> len(payload) < 850, float(error @ error / (x @ x)) < 0.05
      (True, True)

    Reference:
      Vogels, Karimireddy and Jaggi 2019, "PowerSGD"; Halko, Martinsson and Tropp 2011, "Finding
      structure with randomness", algorithm 4.4 (the singular vectors).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"bits": 2.0},
        {"nmse": 0.1, "rank": 4},
    )

    bits: float = 0.1
    nmse: float = 0.0
    step: float = 0.0
    rank: int = 32
    inner: Codec = DTCQ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rank <= 255:
            raise ConfigError(f"codec.rank must be from 0 to 255, not {self.rank}")
        if not isinstance(self.inner, SteppedCodec):
            raise ConfigError("codec.inner must be a codec with a step, such as dtcq")

    @property
    def _inner(self) -> SteppedCodec:
        assert isinstance(self.inner, SteppedCodec)
        return self.inner

    @property
    def unbiased(self) -> bool:
        """Whether ``inner`` is."""
        return self.inner.unbiased

    def max_body_bytes(self, layout: Layout) -> int:
        """Factors of the highest ranks at eight bytes, and the bound of ``inner``."""
        return 14 + self._factor_limit(layout) + self.inner.max_body_bytes(layout)

    def _factor_limit(self, layout: Layout) -> int:
        sides = sum(sum(_shape(t)) for t in _matrices(layout))
        return 64 + 8 * (1 + self.rank) * (sides + 1)

    def _encode_to(self, x: Vector, layout: Layout, seed: int, goal: Goal) -> bytes:
        choices = _Choices(self, x, layout)
        step = goal.solve(choices.forecast, x)
        # The choice of factors is made once; then the rest alone has to meet the goal.
        step = float(np.float32(step))
        factors = [choice.factors(step) for choice in choices.matrices if step]
        with np.errstate(over="ignore", invalid="ignore"):
            rest = _rest(x, layout, factors, step)
            if not np.isfinite(rest).all():  # near the end of float32
                factors = [factor.none for factor in factors]
                rest = _rest(x, layout, factors, step)
        side = _write(factors, self._factor_limit(layout)) if factors else b""
        head = struct.pack("<f", step) + wire.varint(len(side)) + side
        return head + self._inner._encode_to(rest, layout, seed, goal.less(len(head)))

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        reader = wire.Reader(body)
        (step,) = struct.unpack("<f", reader.take(4))
        if not 0 <= step < float("inf"):
            raise DecodeError(f"a step of {step}")
        side = reader.take(reader.varint())
        matrices = _matrices(layout)
        if len(side) > self._factor_limit(layout) or (side and not matrices):
            raise DecodeError(f"{len(side)} bytes of factors")
        rest = reader.rest()
        if len(rest) > self.inner.max_body_bytes(layout):
            raise DecodeError("what the factors leave is too long")
        out = self.inner._decode(rest, layout, seed)
        if step and matrices:
            for tensor, factor in zip(matrices, _read(side, matrices, self.rank), strict=True):
                view = out[tensor.slice].reshape(_shape(tensor))
                view += factor.product(step)
        elif side:
            raise DecodeError("factors without a step")
        return out


def _rest(x: Vector, layout: Layout, factors: Sequence[_Factors], step: float) -> Vector:
    """Return what the factors leave of ``x``."""
    rest = x.copy()
    for tensor, factor in zip(_matrices(layout), factors, strict=False):
        rest[tensor.slice] -= factor.product(step).ravel()
    return rest


def _shape(tensor: Tensor) -> tuple[int, int]:
    return tensor.rows, tensor.size // tensor.rows


def _matrices(layout: Layout) -> list[Tensor]:
    """Return the tensors that may have a predictor."""
    return [t for t in layout if t.size >= _SMALLEST and min(_shape(t)) >= _NARROWEST]


@dataclass(frozen=True)
class _Factors:
    """Rounded factors of one matrix: left (rank, rows), right (rank, columns), size (rank,)."""

    width: int
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    size: NDArray[np.float32]

    @property
    def none(self) -> _Factors:
        """The same, of rank 0."""
        return _Factors(self.width, self.left[:0], self.right[:0], self.size[:0])

    def product(self, step: float) -> Matrix:
        """Return ``sum_j left_j right_j width^2 / size_j``, float32, on every machine the same."""
        width = step * _WIDTHS[self.width]
        out = np.zeros((self.left.shape[1], self.right.shape[1]), np.float32)
        if self.size.size:
            scale = width / self.size.astype(np.float64)[:, None]
            p = (self.left * scale).T.astype(np.float32)
            accumulate(np.ascontiguousarray(p), (self.right * width).astype(np.float32), out)
        return out


class _Choices:
    """The singular vectors of all matrices, and what each rank would leave."""

    def __init__(self, codec: LowRank, x: Vector, layout: Layout) -> None:
        self.matrices = []
        others = x.copy()
        for tensor in _matrices(layout):
            matrix = x[tensor.slice].reshape(_shape(tensor)).astype(np.float64)
            self.matrices.append(_Choice(codec, matrix))
            others[tensor.slice] = 0
        self._others = codec._inner._forecast(Profile(others, layout))

    def forecast(self, step: float) -> tuple[float, float]:
        """Return expected bits and squared error at a step."""
        bits, error = self._others(step)
        for matrix in self.matrices:
            _, _, more, lost = matrix.best(step)
            bits, error = bits + more, error + lost
        return bits, error


class _Choice:
    """One matrix: its leading singular vectors, and forecasts of what ranks of them leave."""

    def __init__(self, codec: LowRank, matrix: NDArray[np.float64]) -> None:
        rank = min(codec.rank, min(matrix.shape) // 2)
        self._left, self._size, self._right = _leading(matrix, rank)
        rank = self._size.size  # 0 of a matrix of zeros
        ranks = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, rank)
        self._ranks = sorted({r for r in ranks if r <= rank})
        left, right = self._left * self._size, self._right * self._size[:, None]
        # What r singular vectors take from the squares of rows and columns.
        rows = _sums(2 * left * (matrix @ self._right.T) - np.square(left))
        columns = _sums(np.square(right).T)
        squares = np.square(matrix)
        by_row, by_column = squares.sum(1), squares.sum(0)
        self._powers, self._forecasts = [], []
        for r in self._ranks:
            row = np.maximum(by_row - rows[:, r], 0)
            column = np.maximum(by_column - columns[:, r], 0)
            self._powers.append(float(row.sum()))
            self._forecasts.append(codec._inner._forecast(Profile.of_matrix(row, column)))

    def best(self, step: float) -> tuple[int, int, float, float]:
        """Return rank and width of least error plus what bits are worth, and its bits and error."""
        spent, noises = [], []
        for multiple in _WIDTHS:
            width = step * multiple
            bits, noise = np.zeros(self._size.size), np.zeros(self._size.size)
            for side in (self._left.shape[0], self._right.shape[1]):
                bits += side / 2 * np.log2(1 + np.square(4.1 * self._size / width) / side)
                noise += np.minimum(side * width**2 / 12, np.square(self._size))
            spent.append(_sums(bits))
            noises.append(_sums(noise))
        found = []
        for r, power, forecast in zip(self._ranks, self._powers, self._forecasts, strict=True):
            rest_bits, rest_error = forecast(step)
            # Noise of the factors is part of the rest, which sampling makes dearer.
            dearer = 1 + rest_error / power if power else 1.0
            for choice in range(len(_WIDTHS) if r else 1):
                more = rest_bits + float(spent[choice][r])
                lost = rest_error + float(noises[choice][r]) * dearer
                found.append((lost + _WORTH * step**2 * more, r, choice, more, lost))
        return min(found)[1:]

    def factors(self, step: float) -> _Factors:
        """Return the rounded factors of the best rank."""
        r, choice, _, _ = self.best(step)
        width = step * _WIDTHS[choice]
        bits = self._size[:r].astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        size = bits.view(np.float32)
        kept = np.flatnonzero((size > 1e-30) & (self._size[:r] / width < _LIMIT / 2))
        half = np.sqrt(self._size[kept] * size[kept])[:, None] / width
        left = np.rint(self._left.T[kept] * half).astype(np.int32)
        right = np.rint(self._right[kept] * half).astype(np.int32)
        return _Factors(choice, left, right, size[kept])


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of the first 0, 1, ... values of the last axis."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return sums


def _leading(
    matrix: NDArray[np.float64], rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the leading singular vectors and values: (rows, r), (r,), (r, columns)."""
    rows, columns = matrix.shape
    top = np.abs(matrix).max(initial=0)
    if not rank or not top:
        return np.zeros((rows, 0)), np.zeros(0), np.zeros((0, columns))
    matrix = matrix / top
    sketch = min(rank + _OVERSAMPLING, rows, columns)
    start = random.generator(0).standard_normal((columns, sketch))
    basis, _ = np.linalg.qr(matrix @ start)
    basis, _ = np.linalg.qr(matrix.T @ basis)
    basis, _ = np.linalg.qr(matrix @ basis)
    left, size, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], size[:rank] * top, right[:rank]


def _tensors(matrices: Sequence[Tensor], ranks: Sequence[int]) -> list[tuple[int, int]]:
    tensors = []
    for tensor, rank in zip(matrices, ranks, strict=True):
        rows, columns = _shape(tensor)
        tensors += [(rank, max(rank, 1)), (rank * rows, rows), (rank * columns, columns)]
    return tensors


def _write(factors: Sequence[_Factors], limit: int) -> bytes:
    """Return ranks and widths, and the range code of sizes and factors."""
    head = [number for factor in factors for number in (factor.size.size, factor.width)]
    values, tensors = [np.zeros(0, np.int32)], []
    for factor in factors:
        sizes = (factor.size.view(np.uint32) >> np.uint32(16)).astype(np.int32)
        values += [sizes, factor.left.ravel(), factor.right.ravel()]
        tensors += [(sizes.size, max(sizes.size, 1))]
        tensors += [(part.size, max(part.shape[1], 1)) for part in (factor.left, factor.right)]
    body = _range.encode(np.concatenate(values), tensors, limit)
    assert body is not None
    return bytes(head) + body


def _read(side: memoryview, matrices: Sequence[Tensor], most: int) -> list[_Factors]:
    """Return the factors that :func:`_write` wrote.

    Raises:
      DecodeError: On ranks or sizes out of range, or a corrupt range code.
    """
    reader = wire.Reader(side)
    head = bytes(reader.take(2 * len(matrices)))
    ranks, widths = head[::2], head[1::2]
    for rank, width, tensor in zip(ranks, widths, matrices, strict=True):
        if rank > min(most, min(_shape(tensor)) // 2) or width >= len(_WIDTHS):
            raise DecodeError(f"rank {rank}, width {width} for a matrix of {_shape(tensor)}")
    values = _range.decode(reader.rest(), _tensors(matrices, ranks))
    found, at = [], 0
    for rank, width, tensor in zip(ranks, widths, matrices, strict=True):
        rows, columns = _shape(tensor)
        sizes, left, right = np.split(values[at:], np.cumsum([rank, rank * rows]))
        at += rank * (1 + rows + columns)
        if ((sizes <= 0) | (sizes >= 0x7F80)).any():
            raise DecodeError("a singular value is not positive and finite")
        size = (sizes.astype(np.uint32) << np.uint32(16)).view(np.float32)
        factor = left.reshape(rank, rows), right[: rank * columns].reshape(rank, columns)
        found.append(_Factors(width, *factor, size))
    return found
