"""Randomness as an argument: seeds derived by name, streams equal on every machine.

What both ends must re-draw (dither, sampled positions) comes from the raw words of Philox4x64-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter-based standard that
NumPy guarantees to the bit on every platform, unlike the distributions of ``Generator``.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

SEED_BITS = 64


def derive(seed: int, *path: int | str) -> int:
    """Return the 63-bit seed of a named purpose below ``seed``, e.g. ``derive(0, 3, node, "sgd")``.

    >>> derive(0, 1, "encode") == derive(0, 1, "encode") != derive(0, 2, "encode")
    True
    """
    text = "/".join([str(int(seed)), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def round_seed(seed: int, server_round: int) -> int:
    """Return the seed below a run's that all uplink payloads of a round share."""
    return derive(seed, server_round, "uplink")


def words(seed: int, count: int, purpose: str = "") -> NDArray[np.uint32]:
    """Return ``count`` random 32-bit words, shape (count,), a pure function of the arguments."""
    key = np.frombuffer(
        hashlib.sha256(f"{seed % 2**SEED_BITS}/{purpose}".encode()).digest()[:16], "<u8"
    )
    raw = np.random.Philox(key=key).random_raw((count + 1) // 2)
    return np.asarray(raw, dtype="<u8").view("<u4")[:count].astype(np.uint32, copy=False)


def uniform(seed: int, count: int, purpose: str = "") -> NDArray[np.float32]:
    """Return (count,) float32 uniform in the open interval (0, 1), symmetric about 1/2.

    The values are ``(k + 1/2) / 2**23`` for 23-bit ``k``: exact in float32, never 0 or 1.

    >>> u = uniform(7, 100_000)
    >>> bool(u.min() > 0 and u.max() < 1 and abs(u.mean(dtype=float) - 0.5) < 0.005)
    True
    """
    k = (words(seed, count, purpose) >> np.uint32(9)).astype(np.float32)
    k += np.float32(0.5)
    k *= np.float32(2.0**-23)
    return k


def generator(seed: int) -> np.random.Generator:
    """Return a generator for choices that only one end makes (sampling, batch order)."""
    return np.random.Generator(np.random.PCG64(seed))
