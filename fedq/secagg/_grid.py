"""The common grid: what a client sends is integers, the same step for all clients of a round."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq import random, registry
from fedq.codecs._hadamard import Rotation
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Vector
from fedq.secagg._words import Segment

Integers = NDArray[np.int64]

MAX_BITS = 32
#: Of a coordinate of the state and of the loss: they are few, and must not be noisy.
STATE_BITS = 24
#: Beyond any sane loss.
LOSS_CLIP = 64.0


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How floats become integers: agreed on per round, part of what the server signs.

    A coordinate x of the update becomes ``floor(clamp(x) / step + u)`` with u uniform in (0, 1) and
    ``step = clip / (2**(bits-1) - 1)``: unbiased within the clip. It is multiplied by the
    client's weight. The state (its change), the loss and the weight itself are a second segment, on
    a fine grid of its own.

    Args:
      bits: Of an update's code, 2 to 16.
      clip: Coordinates of an update are clamped to +-clip.
      max_weight: Largest weight of a client, a whole number.
      rotate: Whether to rotate the update first, by a random Hadamard matrix common to all.
      state_clip: The state's change is clamped to +-state_clip.
    """

    bits: int
    clip: float
    max_weight: int = 1
    rotate: bool = False
    state_clip: float = 256.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ConfigError(f"secure_aggregation.bits must be 2 to 16, not {self.bits}")
        for option in ("clip", "state_clip"):
            value = getattr(self, option)
            if not (0 < value < math.inf and value / self.levels > 0):
                raise ConfigError(
                    f"secure_aggregation.{option} must be a positive number, not {value}"
                )
        if self.max_weight < 1:
            raise ConfigError("a weight is at least 1")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Grid:
        """Build from a peer's words; the inverse of :meth:`to_config`.

        Raises:
          ConfigError: If an entry is missing or ill-typed.
        """
        hints = typing.get_type_hints(cls)
        if set(config) != set(hints):
            raise ConfigError("the round's grid has other options than ours")
        return cls(**{key: registry.convert(config[key], hints[key], key) for key in hints})

    def to_config(self) -> dict[str, Any]:
        """Return what a round announces of it, JSON-ready."""
        return dataclasses.asdict(self)

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits - 1) - 1

    @property
    def step(self) -> float:
        """What a code of 1 stands for."""
        return self.clip / self.levels

    def segments(self, clients: int, d: int, s: int) -> tuple[Segment, Segment]:
        """Return the masked vector's two parts for up to ``clients`` clients.

        Args:
          clients: Of the round: the sum of as many must not wrap.
          d: Coordinates of the update.
          s: Coordinates of the state.

        Raises:
          ConfigError: If a coordinate needs more than 32 bits.

        Example:
          >>> Grid(bits=8, clip=0.1).segments(100, 1000, 0)[0].bits
          15
        """
        bits = (2 * clients * self.max_weight * self.levels).bit_length()
        if bits > MAX_BITS:
            raise ConfigError(
                f"the sum of {clients} clients needs {bits} bits per coordinate "
                f"({self.bits} for the codes, weights up to {self.max_weight}), at most "
                f"{MAX_BITS} are sent; lower secure_aggregation.bits, max_examples or "
                "clients_per_round, or use weighting=uniform"
            )
        finer = (2 * clients * self.max_weight * _levels(STATE_BITS)).bit_length()
        size = Rotation(d, 1, 0).padded if self.rotate else d
        return Segment(size, bits), Segment(s + 2, min(finer, 64))

    def encode(
        self,
        delta: Vector,
        state: Vector,
        *,
        loss: float,
        weight: int,
        seed: int,
        rotation_seed: int = 0,
    ) -> list[Integers]:
        """Return a client's integers, one array per segment.

        Args:
          delta: (d,) float32 update.
          state: (s,) float32, change of the state.
          loss: Mean training loss.
          weight: 1 to ``max_weight``; more is clamped.
          seed: Of the rounding; each client and round its own.
          rotation_seed: Common to all clients of a round.

        Raises:
          ConfigError: If a value is NaN or infinite.
        """
        if not (np.isfinite(delta).all() and np.isfinite(state).all() and math.isfinite(loss)):
            raise ConfigError("an update holds NaN or infinity; lower the learning rate")
        weight = min(max(int(weight), 1), self.max_weight)
        x = self._rotated(delta, rotation_seed) if self.rotate else delta
        codes = _round(x, self.clip, self.levels, random.uniform(seed, x.size, "grid"))
        codes *= weight
        fine = np.append(state.astype(np.float64) / self.state_clip, loss / LOSS_CLIP)
        u = random.uniform(seed, fine.size, "grid state")
        record = np.append(_round(fine, 1.0, _levels(STATE_BITS), u), 1) * weight
        return [codes, record]

    def decode(
        self, sums: Sequence[Integers], clients: int, d: int, rotation_seed: int = 0
    ) -> Aggregate:
        """Return the weighted means that sums of ``clients`` clients stand for.

        Raises:
          DecodeError: If no honest clients can have such sums. A sum inside the range says nothing
            about who sent what.
        """
        codes, record = sums
        total = int(record[-1])
        if not clients <= total <= clients * self.max_weight:
            raise DecodeError(f"{clients} clients cannot weigh {total} together: one of them lied")
        if codes.size and max(codes.max(), -codes.min()) > total * self.levels:
            raise DecodeError("a coordinate's sum is beyond the clip: a client sent more than that")
        fine = record[:-1]
        if np.abs(fine).max() > total * _levels(STATE_BITS):
            raise DecodeError("a sum of states is beyond the clip: a client sent more than that")
        mean = (codes * (self.step / total)).astype(np.float32)
        if self.rotate:
            rotation = Rotation(d, 1, rotation_seed)
            mean = rotation.backward(mean, [1.0] * len(rotation.sizes))
        means = fine / (total * _levels(STATE_BITS))
        return Aggregate(
            mean,
            (means[:-1] * self.state_clip).astype(np.float32),
            float(means[-1] * LOSS_CLIP),
            total,
        )

    def _rotated(self, delta: Vector, seed: int) -> Vector:
        rotation = Rotation(delta.size, 1, seed)
        z, units = rotation.forward(delta)
        for (start, stop), unit in zip(rotation.pieces(), units, strict=True):
            z[start:stop] *= np.float32(unit / rotation.gain(stop - start))
        return z


@dataclass(frozen=True)
class Aggregate:
    """What the server learns of some clients.

    Attributes:
      delta: (d,) float32, weighted mean update; or the sum of a privacy mechanism's codes, (count,)
        int64, for the mechanism to decode.
      state: (s,) float32, weighted mean change of the state.
      loss: Weighted mean loss; None if clients do not say it.
      weight: Sum of the weights.
    """

    delta: NDArray[Any]
    state: Vector
    loss: float | None
    weight: int


def _levels(bits: int) -> int:
    return (1 << bits - 1) - 1


def _round(x: NDArray[np.floating], clip: float, levels: int, u: NDArray[np.float32]) -> Integers:
    scaled = np.clip(x, -clip, clip) * x.dtype.type(levels / clip)
    np.floor(np.add(scaled, u, out=scaled), out=scaled)
    np.clip(scaled, -levels, levels, out=scaled)  # a sum that float32 rounded up
    codes: Integers = scaled.astype(np.int64)
    return codes
