"""Privacy by the clients' own integer noise: what the mechanisms on a sum of codes share.

    clip -> rotate -> scale -> round at random -> integer noise -> code modulo 2**bits

Values and pure functions over NumPy: a protocol that adds codes modulo ``2**bits`` without showing
them needs an :class:`Encoder` and no more.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.base import Aggregator, Stream
from fedq.codecs._bits import pack, unpack
from fedq.codecs._hadamard import Rotation, piece_sizes
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Vector
from fedq.privacy._clip import clipped
from fedq.privacy._entropy import Entropy
from fedq.privacy._ledger import Rdp
from fedq.privacy._samplers import Integers, Table
from fedq.privacy.base import ClientLevel, PrivacyState, Protected, Round
from fedq.random import derive

#: exp(-1/2): the chance that a rounding is drawn again, at most (Kairouz et al. 2021, section 4).
LOG_RETRY = 0.5
#: Standard deviations of the sum that the codes have room for, to either side.
ROOM = 6.0


class Encoder(abc.ABC):
    """One round's map between vectors and integer codes whose sum is noisy.

    Attributes:
      size: d, coordinates of a vector.
      clip: Bound on the Euclidean norm.
      cohort: n, clients that share the noise.
      bits: The modulus of codes and sums is ``2**bits``.
      seed: Of the rotation, the same for all clients of a round.
    """

    size: int
    clip: float
    cohort: int
    bits: int
    seed: int

    @cached_property
    def rotation(self) -> Rotation:
        """The rotation that all clients of a round share."""
        return Rotation(self.size, 1, self.seed)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(d,) places: neighbours are sent far apart, as a rotation mixes one piece at a time.

        Else the few coordinates of a last layer would share one short piece, and exceed the codes.
        """
        stride = max(1, round(self.size * (math.sqrt(5) - 1) / 2))
        while math.gcd(stride, self.size) > 1:
            stride += 1
        order: NDArray[np.int64] = np.arange(self.size) * stride % max(self.size, 1)
        return order

    @property
    def count(self) -> int:
        """Codes per vector: d and what the rotation pads."""
        return self.rotation.padded

    @property
    def largest(self) -> int:
        """The largest code of one client."""
        return (1 << self.bits) - 1

    @abc.abstractmethod
    def encode(self, x: Vector, entropy: Entropy) -> Integers:
        """Return the codes of a (d,) float32 vector, (count,) int64 in [0, 2**bits)."""

    @abc.abstractmethod
    def decode(self, total: Integers, n: int) -> Vector:
        """Return the mean of n vectors, (d,) float32, from the sum of their codes.

        Args:
          total: (count,) int64, the sum of n code vectors modulo ``2**bits``; any representative.
          n: How many are in it, at least 1.
        """

    def _rotated(self, x: Vector) -> NDArray[np.float64]:
        """Return the clipped vector, rotated without a change of length, (count,) float64."""
        z, units = self.rotation.forward(clipped(x, self.clip)[self.order])
        out = z.astype(np.float64)
        for (start, stop), unit in zip(self.rotation.pieces(), units, strict=True):
            out[start:stop] *= unit / self.rotation.gain(stop - start)
        return out

    def _derotated(self, z: NDArray[np.float64]) -> Vector:
        """Return (d,) float32, the inverse of :meth:`_rotated` but for the clipping."""
        out = np.empty(self.size, np.float32)
        pieces = len(self.rotation.sizes)
        out[self.order] = self.rotation.backward(z.astype(np.float32), [1.0] * pieces)
        return out


@dataclass(frozen=True)
class NoisyCodes(Encoder):
    """Vectors scaled to an integer grid and rounded at random, with additive noise.

    Rounding is drawn again until the rounded vector is no longer than ``l2``, so that the
    sensitivity is a fact and not a probability::

        l2**2 = min((g C + sqrt(d))**2, (g C)**2 + d / 4 + sqrt(2 log(1 / b)) (g C + sqrt(d) / 2))

    with g the scale, C the clip, and b = exp(-1/2).

    Attributes:
      scale: Steps of the grid per unit.
      variance: Of each client's noise, in squared steps.
      noise: The distribution of a given variance.

    Reference:
      Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism for federated
      learning with secure aggregation", section 4 (algorithm 1).
    """

    size: int
    clip: float
    cohort: int
    bits: int
    seed: int
    scale: float
    variance: float
    noise: Callable[[float], Table]

    @property
    def l2(self) -> float:
        """Bound on the Euclidean norm of a rounded vector, in steps."""
        return rounded_norm(self.scale * self.clip, self.count)

    def rounded(self, x: Vector, entropy: Entropy) -> Integers:
        """Return the integers of a vector before the noise, no longer than :attr:`l2`."""
        scaled = self._rotated(x) * self.scale
        # Float32 rotations may lengthen by a few ulps.
        scaled *= min(1.0, self.scale * self.clip / max(float(np.linalg.norm(scaled)), 1e-300))
        below = np.floor(scaled)
        share = scaled - below
        limit = self.l2**2
        while True:
            integers = (below + (entropy.uniform(self.count) < share)).astype(np.int64)
            if int(np.dot(integers, integers)) <= limit:
                return integers

    def encode(self, x: Vector, entropy: Entropy) -> Integers:
        """Return the codes of a (d,) float32 vector, (count,) int64 in [0, 2**bits)."""
        codes = self.rounded(x, entropy)
        codes += self.noise(self.variance).sample(self.count, entropy)
        codes &= (1 << self.bits) - 1
        return codes

    def decode(self, total: Integers, n: int) -> Vector:
        """Return the mean of n vectors; a sum beyond the modulus has wrapped."""
        half = 1 << (self.bits - 1)
        centred = ((total + half) & ((1 << self.bits) - 1)) - half
        return self._derotated(centred / (self.scale * n))


def rounded_norm(length: float, count: int) -> float:
    """Return the norm that rounding may give a vector of ``length`` steps; see :class:`NoisyCodes`.

    >>> round(rounded_norm(1000.0, 10_000), 1)
    1001.8
    """
    root = math.sqrt(count)
    likely = length**2 + count / 4 + math.sqrt(2 * LOG_RETRY) * (length + root / 2)
    return min(length + root, math.sqrt(likely))


def scale_for(bits: int, clip: float, cohort: int, count: int, sigma: float) -> float:
    """Return the largest scale whose noisy sums fit ``bits``, even if all clients agree.

    A coordinate of the sum then has, over rotations, the standard deviation
    ``sqrt((g n C)**2 / d + n / 4 + (z l2)**2)``; six of them fit to either side.

    Raises:
      ConfigError: If the bits do not suffice for noise and rounding alone.
    """

    def spread(scale: float) -> float:
        noise = sigma * rounded_norm(scale * clip, count)
        return math.sqrt((scale * cohort * clip) ** 2 / count + cohort / 4 + noise**2)

    room = 2.0 ** (bits - 1) / ROOM
    # Coarser than this, rounding is as large as the update, and no bits are worth their noise.
    low = math.sqrt(count) / (2 * clip)
    if spread(low) > room:
        least = bits + math.ceil(math.log2(spread(low) / room))
        raise ConfigError(
            f"privacy.bits={bits} is too few for {cohort} clients, {count} coordinates and noise "
            f"{sigma:.3g}; take at least {least}, or lower the noise"
        )
    high = 2 * low
    while spread(high) <= room:
        low, high = high, 2 * high
    while high > low * (1 + 1e-9):
        middle = (low + high) / 2
        low, high = (middle, high) if spread(middle) <= room else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Distributed(ClientLevel):
    """A client-level mechanism whose noise the clients add, each a share of it."""

    integers: ClassVar[bool] = True
    against: ClassVar[str] = (
        "whoever sees released models or sums of codes alone. Without secure aggregation the server"
        " sees each client's codes, whose own share of the noise protects far less than the stated"
        " epsilon"
    )
    against_masked: ClassVar[str] = (
        "whoever sees released models or sums of codes, the server included: secure aggregation"
        " shows it sums alone"
    )
    assumptions: ClassVar[tuple[str, ...]] = (
        *ClientLevel.assumptions,
        "each client whose update counts added its share of the noise, and is not on the"
        " adversary's side: f of n that are leave (n - f) / n of the variance",
    )

    @abc.abstractmethod
    def encoder(self, about: Round) -> Encoder:
        """Return the round's encoder; the noise is sized for the whole cohort."""

    def request(self, about: Round) -> Mapping[str, Any]:
        """Return the round's mechanism, once it is known that codes can carry it."""
        encoder_of(self, about)
        return super().request(about)

    def protect(self, delta: Vector, about: Round, entropy: Entropy) -> Protected:
        """Return the update's noisy codes, packed."""
        encoder = encoder_of(self, about)
        codes = encoder.encode(delta, entropy).astype(np.int32)
        return Protected(delta, pack(codes, encoder.largest.bit_length()))

    def unpack(self, payload: bytes | memoryview, about: Round) -> Integers:
        """Return the codes of a payload; DecodeError unless a client can have written it."""
        encoder = encoder_of(self, about)
        codes = unpack(payload, encoder.count, encoder.largest.bit_length())
        if codes.max(initial=0) > encoder.largest:
            raise DecodeError(f"a code exceeds {encoder.largest}")
        return codes.astype(np.int64)

    def stream(
        self, aggregator: Aggregator, about: Round, capacity: int, reference: Vector | None = None
    ) -> Stream:
        """Return an empty sum of codes."""
        return CodeSum(encoder_of(self, about))

    def release(self, mean: NDArray[Any], replies: int, about: Round, entropy: Entropy) -> Vector:
        """Return the decoded sum over the cohort's size; the noise is in it."""
        out: Vector = mean * np.float32(replies / about.cohort)
        return out

    def statement(
        self, state: PrivacyState | None, clients: int, *, masked: bool = False
    ) -> dict[str, Any]:
        """Return the guarantee; it holds against the server, too, if that sees sums only."""
        said = super().statement(state, clients, masked=masked)
        return {**said, "against": self.against_masked} if masked else said


@dataclass(frozen=True, kw_only=True)
class Additive(Distributed):
    """A mechanism that adds noise to rounded codes; see :class:`NoisyCodes`.

    Args:
      bits: Width of a code and of the sum, from 2 to 16.
    """

    bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 16:
            raise ConfigError(f"privacy.bits must be from 2 to 16, not {self.bits}; 16 is free")

    @abc.abstractmethod
    def noise(self, variance: float) -> Table:
        """Return the distribution of a client's noise in one coordinate."""

    @abc.abstractmethod
    def additive_rdp(self, codes: NoisyCodes, variance: float, replies: int) -> Rdp:
        """Return the RDP of a sum of ``replies`` clients, each with noise of ``variance``."""

    def encoder(self, about: Round) -> NoisyCodes:
        """Return the round's encoder: as fine a grid as the bits allow."""
        seed = derive(about.seed, about.number, "rotation")
        count = sum(piece_sizes(about.size))
        scale = scale_for(self.bits, self.clip, about.cohort, count, self.sigma)
        variance = (self.sigma * rounded_norm(scale * self.clip, count)) ** 2 / about.cohort
        return NoisyCodes(
            about.size, self.clip, about.cohort, self.bits, seed, scale, variance, self.noise
        )

    def rdp(self, replies: int, about: Round) -> Rdp:
        """Return what a sum costs with the noise that ``replies`` clients brought."""
        codes = self.encoder(about)
        return self.additive_rdp(codes, codes.variance, replies)


@lru_cache(maxsize=4)
def encoder_of(privacy: Distributed, about: Round) -> Encoder:
    """Return ``privacy.encoder(about)``, made once for all updates of a round."""
    return privacy.encoder(about)


class CodeSum(Stream):
    """A sum of codes modulo a power of two; the result is the mean of the vectors.

    Any order gives the same bits. 8 bytes per coordinate, however many updates come.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._total = np.zeros(encoder.count, np.int64)
        self._count = 0

    def add(self, update: NDArray[Any], weight: float, slot: int) -> None:
        """Add codes, (count,) int64: one update's, or the sum of as many as ``weight`` says."""
        if update.dtype != np.int64 or update.shape != self._total.shape:
            raise ConfigError(f"expected {self._total.size} codes of int64")
        self._total += update
        self._total &= (1 << self._encoder.bits) - 1
        self._count += int(weight)

    def result(self) -> Vector:
        """Return the mean of the vectors, (d,) float32."""
        if not self._count:
            raise ConfigError("there are no updates to sum")
        return self._encoder.decode(self._total, self._count)
