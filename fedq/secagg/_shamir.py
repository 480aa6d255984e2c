"""Secret sharing over a prime field (Shamir 1979, "How to share a secret").

A secret is the value at 0 of a random polynomial of degree t - 1; a share is its value at a
holder's own x. Any t shares determine it, and t - 1 say nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

#: The largest prime below 2**256: secrets and shares are 32 bytes.
PRIME = 2**256 - 189
SHARE_BYTES = 32


def draw() -> bytes:
    """Return a uniform secret."""
    return secrets.randbelow(PRIME).to_bytes(SHARE_BYTES, "big")


def split(secret: bytes, threshold: int, holders: Sequence[int]) -> dict[int, bytes]:
    """Return a share for each holder.

    Args:
      secret: 32 bytes below :data:`PRIME`, big-endian.
      threshold: Shares that determine the secret, t >= 1.
      holders: Their distinct x, positive and far below :data:`PRIME`.

    Example:
      >>> shares = split(bytes(31) + b"!", 2, [1, 2, 3])
      >>> combine({x: shares[x] for x in (1, 3)})[-1:]
      b'!'
    """
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    shares = {}
    for x in holders:
        value = 0
        for coefficient in coefficients:  # x is small: to reduce once at the end is faster
            value = value * x + coefficient
        shares[x] = (value % PRIME).to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes], at_zero: Mapping[int, int] | None = None) -> bytes:
    """Return the secret that exactly t shares determine, by their x.

    Args:
      shares: As many as the threshold; of more or fewer, another value comes out.
      at_zero: :func:`basis` of the holders, where several secrets have the same ones.
    """
    at_zero = basis(tuple(shares)) if at_zero is None else at_zero
    value = sum(int.from_bytes(share, "big") * at_zero[x] for x, share in shares.items())
    return (value % PRIME).to_bytes(SHARE_BYTES, "big")


def basis(holders: tuple[int, ...]) -> dict[int, int]:
    """Return the Lagrange polynomials of the holders at 0."""
    result = {}
    for x in holders:
        above = below = 1
        for other in holders:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        result[x] = above * pow(below, -1, PRIME) % PRIME
    return result
