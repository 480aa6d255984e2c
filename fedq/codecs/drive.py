"""DRIVE: rotate and send signs, at one bit (Vargaftik et al. 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from fedq.codecs._hadamard import check_rounds
from fedq.codecs.base import Codec
from fedq.codecs.eden import Eden
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "drive")
class Drive(Codec):
    """Rotate pieces of ``x`` at random to z, send signs and ``S = |z|**2 / |z|_1``.

    A piece is decoded as the inverse rotation of ``S sign(z)``. That is EDEN at one bit, and so are
    its bytes: EDEN's S is in units of its level, 0.798. The error over ``|x|**2`` is
    ``pi / 2 - 1 = 0.571``. Approximately unbiased, see :class:`fedq.codecs.eden.Eden`.

    Body: S / 0.798 per piece, float32; then one bit per coordinate.

    Args:
      rounds: Of the Hadamard rotation, 1 or 2; sparse and structured vectors need 2.

    Example:
      >>> import numpy as np
      >>> layout = Layout.flat(4096)
      >>> x = np.sin(np.arange(4096, dtype=np.float32) ** 2)
      >>> error = Drive().decode(Drive().encode(x, layout), layout) - x
      >>> 0.5 < float((error @ error) / (x @ x)) < 0.65
      True

    Reference:
      Vargaftik et al. 2021, "DRIVE: one-bit distributed mean estimation", sections 3 and 4.2 (the
      scale of the unbiased variant).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    rounds: int = 2

    def __post_init__(self) -> None:
        check_rounds(self.rounds)

    @property
    def one_bit(self) -> Eden:
        """The same code as EDEN."""
        return Eden(bits=1.0, rounds=self.rounds)

    @property
    def unbiased(self) -> bool:
        """False: only nearly, as Hadamard rotations are not uniformly random."""
        return False

    def max_body_bytes(self, layout: Layout) -> int:
        """A scale per piece and one bit per padded coordinate."""
        return self.one_bit.max_body_bytes(layout)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        return self.one_bit._encode(x, layout, seed)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        return self.one_bit._decode(body, layout, seed)
