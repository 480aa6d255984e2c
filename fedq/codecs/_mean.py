"""The weighted mean of encoded vectors, decoded one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Lock

from fedq.aggregators.mean import MeanStream
from fedq.codecs.base import decode
from fedq.errors import ConfigError
from fedq.layout import Layout, Vector
from fedq.threads import in_threads


def mean(
    payloads: Iterable[bytes | memoryview],
    weights: Iterable[float],
    layout: Layout,
    *,
    threads: int = 1,
) -> Vector:
    """Return the weighted mean of payloads of any codec, (d,) float32.

    Each is decoded, added exactly and forgotten: there are 16 bytes per coordinate for the sum and
    4 per thread, however many payloads. The result is the same, to the bit, for any number of
    threads and any order.

    Args:
      payloads: Of :meth:`fedq.codecs.Codec.encode`; taken one by one, so a generator will do.
      weights: As many, in [0, 2**20).
      layout: Names and shapes of the d coordinates.
      threads: That decode.

    Raises:
      DecodeError: If a payload is malformed.
      ConfigError: If there is no positive weight, their number is another, or a value or weight is
        out of the range of :class:`fedq.aggregators.mean.MeanStream`.

    Example:
      >>> import numpy as np
      >>> from fedq.registry import build
      >>> codec, layout = build("codec", "identity"), Layout.flat(2)
      >>> payloads = [codec.encode(x, layout) for x in np.array([[1.0, 2.0], [4.0, 8.0]])]
      >>> mean(payloads, [1, 2], layout)
      array([3., 6.], dtype=float32)
    """
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")
    stream, lock = MeanStream(layout.size), Lock()

    def add(item: tuple[bytes | memoryview, float]) -> None:
        payload, weight = item
        update = decode(payload, layout)
        with lock:
            stream.add(update, weight)

    for _ in in_threads(add, _pairs(payloads, weights), threads):
        pass
    return stream.result()


def _pairs(
    payloads: Iterable[bytes | memoryview], weights: Iterable[float]
) -> Iterator[tuple[bytes | memoryview, float]]:
    try:
        yield from zip(payloads, weights, strict=True)
    except ValueError as error:
        raise ConfigError(f"a mean needs one weight for each payload: {error}") from error
