"""What a server knows of its clients' devices: simulated ones say it, real ones measure it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedq.errors import ConfigError

#: Bits of a weight that is not quantized.
FLOAT_BITS = 32


@dataclass(frozen=True)
class Capacity:
    """What one device can do; None where that is not known.

    Attributes:
      uplink_mbps: Of its link.
      speed: Of its training, in a unit that is the same for all clients.
    """

    uplink_mbps: float | None = None
    speed: float | None = None


class Capacities:
    """What is known of all clients that are there.

    Args:
      known: By client.

    Example:
      >>> all_of_them = Capacities({0: Capacity(1.0), 1: Capacity(3.0), 2: Capacity()})
      >>> all_of_them[0], all_of_them[7], all_of_them.median.uplink_mbps
      (Capacity(uplink_mbps=1.0, speed=None), Capacity(uplink_mbps=None, speed=None), 3.0)
    """

    def __init__(self, known: Mapping[int, Capacity] | None = None) -> None:
        self._known = dict(known or {})

    def __getitem__(self, client: int) -> Capacity:
        """Return what is known of a client."""
        return self._known.get(client, Capacity())

    @cached_property
    def median(self) -> Capacity:
        """The medians of what is known, the upper one of two."""
        return Capacity(
            _median([one.uplink_mbps for one in self._known.values()]),
            _median([one.speed for one in self._known.values()]),
        )


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def width_for(widths: Sequence[int], speed: float | None, median: float | None) -> int:
    """Return the place of the weight width that suits a device; the widest if nothing is known.

    It is the one nearest, in ratio, to the share of the widest that the device's speed is of the
    median's: devices that are nearly alike are treated alike.

    Args:
      widths: Bits of weights; 0 is float.
      speed: Of the device.
      median: Of all devices, in the same unit.

    Example:
      >>> [width_for([8, 4, 2], speed, 1.0) for speed in (3.0, 0.8, 0.6, 0.3, 0.1)]
      [0, 0, 1, 2, 2]
    """
    bits = [width or FLOAT_BITS for width in widths]
    if speed is None or median is None:
        return bits.index(max(bits))
    wanted = max(bits) * min(speed / median, 1.0)
    return min(range(len(bits)), key=lambda place: abs(math.log(bits[place] / wanted)))


def variant_of(variants: Sequence[str], said: object, asked: str | None, number: int) -> int:
    """Return which of several kinds a device is: it says so itself, or it was asked, or its number.

    Args:
      variants: Names of the kinds, such as ``w8``.
      said: Bits of weights by the device's own configuration; 0 is float, None leaves it open.
      asked: By the server, a name; None leaves it open.
      number: Of the client.

    Raises:
      ConfigError: If there is no such kind.

    Example:
      >>> [variant_of(["w8", "w2"], *of) for of in ((2, "w8", 0), (None, "w2", 0), (None, None, 3))]
      [1, 1, 1]
    """
    if len(variants) > 1 and said is not None:
        name = f"w{said}" if str(said) != "0" else "float"
        if name not in variants:
            raise ConfigError(
                f"weight-bits={said} is none of the federation's widths: {', '.join(variants)}"
            )
        return variants.index(name)
    if asked is None:
        return number % len(variants)
    if asked not in variants:
        raise ConfigError(f"the request names a width that is not there: {asked!r}")
    return variants.index(asked)
