"""What every codec is: a frozen configuration with two verbs."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fedq import wire
from fedq.errors import ConfigError, DecodeError
from fedq.layout import Layout, Vector
from fedq.random import SEED_BITS, derive


class Codec(abc.ABC):
    """A map from float32 vectors to bytes and back.

    Subclasses are registered frozen dataclasses that implement :meth:`_encode` and :meth:`_decode`
    on the body; this class frames, checks and seals. A payload carries the codec's name, its
    parameters, the seed and a checksum, so that the layout is all a decoder needs to know.
    """

    group: ClassVar[str] = "codec"
    name: ClassVar[str]
    #: Constructor arguments that the law suite tries.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    #: Whether the codec works only outermost: inside another, nobody keeps what it asks to keep.
    outermost: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what cannot stand inside; codecs with an inner codec call this from theirs."""
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            inner = getattr(self, option.name)
            if isinstance(inner, Codec) and inner.outermost:
                raise ConfigError(
                    f"{inner.name} must be outermost, as its sender keeps a residual beside it: "
                    f"choose another codec.{option.name} for {self.name}"
                )

    @property
    @abc.abstractmethod
    def unbiased(self) -> bool:
        """Whether ``E[decode(encode(x, seed))] == x`` over seeds, for every ``x``."""

    @abc.abstractmethod
    def max_body_bytes(self, layout: Layout) -> int:
        """Return an upper bound on the body of any payload for ``layout``, in bytes."""

    @abc.abstractmethod
    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        """Encode a finite, contiguous (d,) vector; must not write to ``x``."""

    @abc.abstractmethod
    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        """Decode a body; :class:`DecodeError` on anything ``_encode`` cannot have written."""

    def client_seed(self, round_seed: int, client: int) -> int:
        """Return the seed of a client's payload in a round; the server accepts no other.

        32 bits of it, to be short on the wire. A codec whose clients draw together overrides this.

        Args:
          round_seed: From :func:`fedq.random.round_seed`, the same for all clients.
          client: The client's number.
        """
        return derive(round_seed, client, "encode") >> 31

    @property
    def predictive(self) -> bool:
        """Whether a reference vector that both ends hold makes payloads shorter."""
        return False

    def settle(self, x: Vector, previous: Vector, layout: Layout) -> Vector:
        """Return what to encode for ``x`` once ``previous`` was decoded: near ``x``, and cheaper.

        For a sender that keeps the difference, and sends again; all arguments are (d,) float32.
        """
        return x

    def _encode_beside(self, x: Vector, reference: Vector, layout: Layout, seed: int) -> bytes:
        """Encode given a finite, contiguous (d,) reference; only asked of predictive codecs."""
        raise NotImplementedError

    def _decode_beside(
        self, body: memoryview, reference: Vector, layout: Layout, seed: int
    ) -> Vector:
        """Decode given the reference; only asked of predictive codecs."""
        raise NotImplementedError

    def encode(
        self, x: Vector, layout: Layout, seed: int = 0, *, reference: Vector | None = None
    ) -> bytes:
        """Encode a vector.

        Args:
          x: (d,) finite values; converted to float32.
          layout: Names and shapes of the d coordinates.
          seed: Any integer; what is random in the code depends on it and on nothing else.
          reference: (d,) finite float32 that the decoder also holds, close to ``x`` or at least
            large where ``x`` is. It changes the length of the payload, never what is decoded.

        Raises:
          ConfigError: If ``x`` or ``reference`` has another shape than the layout, or holds NaN or
            infinity, if ``reference`` is not float32, or the codec is not predictive.
        """
        x = _checked(_float32(x), layout, "vector")
        seed = int(seed) % 2**SEED_BITS
        if reference is None:
            body = self._encode(x, layout, seed)
        else:
            if not self.predictive:
                raise ConfigError(f"codec '{self.name}' cannot use a reference")
            reference = _checked(reference, layout, "reference")
            body = self._encode_beside(x, reference, layout, seed)
        return wire.seal_frame(self, layout, seed, body, reference)

    def decode(
        self, payload: bytes | memoryview, layout: Layout, *, reference: Vector | None = None
    ) -> Vector:
        """Decode a payload of this codec, (d,) float32, with the parameters it carries.

        Raises:
          DecodeError: If the payload is malformed, of another codec, for another layout or beside
            another reference.
          ConfigError: If ``reference`` is not a finite float32 vector of the layout's size.
        """
        if reference is not None:
            reference = _checked(reference, layout, "reference")
        frame = wire.open_frame(payload, layout, reference)
        if type(frame.codec) is not type(self):
            raise DecodeError(f"payload is of codec '{frame.codec.name}', not '{self.name}'")
        return decode_frame(frame, layout, reference)


def _float32(x: Any) -> Vector:
    try:
        if np.iscomplexobj(x):
            raise TypeError
        with np.errstate(over="ignore"):  # too large for float32: refused as infinite
            return np.asarray(x, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError("expected a vector of real numbers") from None


def _checked(x: Vector, layout: Layout, what: str) -> Vector:
    """Return a contiguous, finite (d,) float32 vector, or say why there is none."""
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.shape != (layout.size,):
        got = f"{x.dtype} of shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ConfigError(f"expected a float32 {what} of shape ({layout.size},), not {got}")
    if not np.isfinite(x).all():
        raise ConfigError(f"cannot use a {what} with NaN or infinity")
    return np.ascontiguousarray(x)


def decode(
    payload: bytes | memoryview, layout: Layout, *, reference: Vector | None = None
) -> Vector:
    """Decode a payload of any registered codec, (d,) float32; see :meth:`Codec.decode`."""
    if reference is not None:
        reference = _checked(reference, layout, "reference")
    return decode_frame(wire.open_frame(payload, layout, reference), layout, reference)


def decode_frame(frame: wire.Frame, layout: Layout, reference: Vector | None = None) -> Vector:
    """Decode an opened frame, (d,) float32; see :meth:`Codec.decode`."""
    codec: Codec = frame.codec
    if reference is not None and not codec.predictive:
        raise DecodeError(f"codec '{codec.name}' cannot use a reference")
    if len(frame.body) > codec.max_body_bytes(layout):
        raise DecodeError(f"payload is too long for {layout.size} coordinates")
    with np.errstate(all="ignore"):  # hostile scales overflow; finiteness is checked below
        if reference is None:
            y = codec._decode(frame.body, layout, frame.seed)
        else:
            y = codec._decode_beside(frame.body, reference, layout, frame.seed)
    if y.shape != (layout.size,) or y.dtype != np.float32:
        raise AssertionError(f"codec '{codec.name}' returned {y.dtype} of shape {y.shape}")
    if not np.isfinite(y).all():
        raise DecodeError("payload decodes to NaN or infinity")
    return y
