"""Error feedback: what a codec loses in one round is added to the next."""

from __future__ import annotations

import numpy as np

from fedq.codecs.error_feedback import ErrorFeedback
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector


def compensate(
    codec: ErrorFeedback,
    x: Vector,
    residual: Vector | None,
    layout: Layout,
    seed: int,
    *,
    reference: Vector | None = None,
) -> tuple[bytes, Vector]:
    """Encode an update together with what earlier rounds lost.

    With ``target = x + decay * residual`` the payload encodes ``target``, and the new residual is
    ``target - decode(payload)``: with ``decay = 1`` the sum of all decoded updates plus the last
    residual is the sum of all updates, up to float32 rounding.

    Args:
      codec: Its ``inner`` codes, its ``decay`` forgets.
      x: (d,) float32 update of this round.
      residual: (d,) float32 of the same device, or None in its first round.
      layout: Names and shapes of the d coordinates.
      seed: As for :meth:`fedq.codecs.Codec.encode`.
      reference: As there.

    Returns:
      The payload, and the new residual, (d,) float32.

    Raises:
      ConfigError: If ``x`` or ``residual`` has a wrong shape, NaN or infinity.

    Example:
      >>> from fedq.registry import build
      >>> codec = build("codec", "error_feedback", inner="sign")
      >>> layout = Layout.flat(2)
      >>> payload, residual = compensate(codec, np.array([1.0, 3.0]), None, layout, seed=0)
      >>> residual
      array([-1.,  1.], dtype=float32)

    Reference:
      Seide et al. 2014, "1-bit stochastic gradient descent and its application to data-parallel
      distributed training of speech DNNs"; Karimireddy et al. 2019, algorithm 2.
    """
    target = np.array(x, dtype=np.float32)
    if residual is not None:
        if residual.shape != (layout.size,) or target.shape != residual.shape:
            shapes = f"{target.shape} and {residual.shape}"
            raise ConfigError(
                f"expected update and residual of shape ({layout.size},), not {shapes}"
            )
        target += np.float32(codec.decay) * residual
    payload = codec.encode(target, layout, seed, reference=reference)
    return payload, target - codec.decode(payload, layout, reference=reference)
