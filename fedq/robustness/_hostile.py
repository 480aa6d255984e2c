"""Hostile bytes for every decoder: what a peer may send in place of an honest payload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedq import codecs, wire
from fedq.codecs.base import Codec
from fedq.errors import DecodeError
from fedq.guard import Guard, GuardState, RejectedError, Size
from fedq.layout import Layout, Vector
from fedq.registry import build, table

#: Small, so that a search makes many tries; rows, columns, scalars and empty tensors.
LAYOUT = Layout(("conv", "bias", "gain", "empty", "head"), ((3, 2, 2), (3,), (), (0, 4), (4, 5)))
_FLOATS = (np.nan, np.inf, -np.inf, -1.0, -0.0, 0.0, 1e-45, 1e-38, 1.0, 3.4e38)
_NO_STATE = np.zeros(0, np.float32)
_SLACK = 1.001


def changed(body: bytes, rng: np.random.Generator) -> bytes:
    """Return bytes with one to three cuts, insertions, floats or bits in the way."""
    out = bytearray(body)
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(6), int(rng.integers(len(out) + 1))
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at:at] = rng.bytes(int(rng.integers(1, 6)))
        elif kind == 2:
            out[at : at + 4] = np.float32(rng.choice(_FLOATS)).tobytes()
        elif at < len(out):
            out[at] = (0, 255, out[at] ^ 1 << int(rng.integers(8)))[kind - 3]
    return bytes(out)


Decoder = Callable[[bytes], Vector]


@dataclass(frozen=True)
class Target:
    """A decoder and the guard behind it, with an honest payload.

    Attributes:
      name: Of the codec.
      layout: Of the payload.
      payload: Honest.
      decode: As the server does.
      honest: (d,) float32, of which the honest payload was made: the guard's yardstick.
    """

    name: str
    layout: Layout
    payload: bytes
    decode: Decoder
    honest: Vector

    @classmethod
    def of(cls, codec: Codec, layout: Layout, rng: np.random.Generator) -> Target:
        """Return the target of a codec, with a payload of random numbers."""
        x = rng.standard_normal(layout.size).astype(np.float32)
        payload = codec.encode(x, layout, 7)

        def decode(data: bytes) -> Vector:
            return codecs.decode(data, layout)

        return cls(codec.name, layout, payload, decode, x)

    def hostile(self, rng: np.random.Generator) -> bytes:
        """Return a hostile payload: a frame that is sealed again, or bytes as a network has them.

        Most keep head and fingerprint and have a right checksum, so that they reach the decoder.
        """
        if rng.random() < 0.1:
            return changed(self.payload, rng)
        frame = wire.open_frame(self.payload, self.layout)
        body = changed(bytes(frame.body), rng)
        return bytes(wire.seal_frame(frame.codec, self.layout, frame.seed, body))

    def judged(self, payload: bytes, guard: Guard) -> str:
        """Return ``refused``, ``harmless`` or what a hostile payload got through.

        Harmless is a finite vector within the guard's limits of an honest one: it may be wrong, but
        does no more than an honest client's numbers could.
        """
        unit = Size.of(self.honest, _NO_STATE)
        watch = guard.watch(GuardState(medians=(unit,)), 1, self.honest)
        try:
            delta = self.decode(payload)
            if delta.shape != (self.layout.size,) or delta.dtype != np.float32:
                return f"{self.name}: a vector of shape {delta.shape} and type {delta.dtype}"
            if not np.isfinite(delta).all():
                return f"{self.name}: numbers that are not finite"
            delta = watch.admit(delta, _NO_STATE)
        except (DecodeError, RejectedError):
            return "refused"
        except Exception as error:  # whatever else escapes would end a round
            return f"{self.name}: {type(error).__name__}: {error}"
        if guard.norm_limit is not None:
            norm = float(np.linalg.norm(delta.astype(np.float64)))
            if norm > _SLACK * guard.norm_limit * unit.norm:
                return f"{self.name}: a norm of {norm:.3g}, {unit.norm:.3g} is usual"
        return "harmless"


def targets(rng: np.random.Generator) -> list[Target]:
    """Return a target for each example of each codec."""
    found: list[Any] = [
        build("codec", name, **options)
        for name, cls in table("codec").items()
        for options in cls.examples  # type: ignore[attr-defined]
    ]
    return [Target.of(codec, LAYOUT, rng) for codec in found]
