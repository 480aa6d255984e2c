"""Error feedback around any codec (Seide et al. 2014, Karimireddy et al. 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

from fedq.codecs.base import Codec
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector
from fedq.registry import register


@register("codec", "error_feedback")
class ErrorFeedback(Codec):
    """Ask the sender to add what earlier rounds lost; on the wire it is ``inner``.

    The sender keeps a residual e per device and runs :func:`fedq.feedback.compensate`::

        payload = encode(x + decay e),   e <- x + decay e - decode(payload)

    A codec alone has no memory: :meth:`encode` here is ``inner``'s.

    Body: the body of ``inner``.

    Args:
      inner: Codec of the corrected updates; a biased one such as ``top_k`` or ``sign`` gains most.
      decay: Share of the residual that is kept, in [0, 1]; below 1 forgets stale residuals of
        devices that are seldom chosen.

    Example:
      >>> from fedq.registry import build
      >>> build("codec", "error_feedback", inner="sign").inner.name
      'sign'

    Reference:
      Karimireddy et al. 2019, "Error feedback fixes signSGD and other gradient compression
      schemes", algorithm 2.
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"inner": "sign"},
        {"inner": {"name": "top_k", "fraction": 0.05}, "decay": 0.9},
        {"inner": {"name": "uniform", "bits": 2, "rounding": "stochastic"}},
    )

    outermost: ClassVar[bool] = True

    inner: Codec
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"codec.decay must be in [0, 1], not {self.decay}")

    @property
    def unbiased(self) -> bool:
        """As ``inner``."""
        return self.inner.unbiased

    @property
    def predictive(self) -> bool:
        """As ``inner``."""
        return self.inner.predictive

    def client_seed(self, round_seed: int, client: int) -> int:
        """As ``inner``."""
        return self.inner.client_seed(round_seed, client)

    def max_body_bytes(self, layout: Layout) -> int:
        """As ``inner``."""
        return self.inner.max_body_bytes(layout)

    def _encode(self, x: Vector, layout: Layout, seed: int) -> bytes:
        return self.inner._encode(x, layout, seed)

    def _decode(self, body: memoryview, layout: Layout, seed: int) -> Vector:
        return self.inner._decode(body, layout, seed)

    def _encode_beside(self, x: Vector, reference: Vector, layout: Layout, seed: int) -> bytes:
        return self.inner._encode_beside(x, reference, layout, seed)

    def _decode_beside(
        self, body: memoryview, reference: Vector, layout: Layout, seed: int
    ) -> Vector:
        return self.inner._decode_beside(body, reference, layout, seed)
