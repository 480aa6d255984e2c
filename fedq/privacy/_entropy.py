"""Random words that an adversary cannot guess: AES-256 in counter mode."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray


class Entropy:
    """A stream of uniform 64-bit words.

    Without a seed its key comes from the operating system and no one else knows it. Whoever knows a
    seed can subtract the noise made from it: a seed is itself a secret, or for experiments alone.

    Args:
      seed: None for a key from the operating system.

    Example:
      >>> Entropy(1).words(4).shape, bool((Entropy(1).words(4) == Entropy(1).words(4)).all())
      ((4,), True)
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is None:
            key = secrets.token_bytes(32)
        else:
            key = hashlib.sha256(f"{seed}/noise".encode()).digest()
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next ``count`` words, (count,) uint64."""
        size = 8 * count
        out = bytearray(size + 15)  # update_into wants room for one more block
        self._stream.update_into(bytes(size), out)
        return np.frombuffer(out, "<u8", count).astype(np.uint64, copy=False)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return multiples of 2**-53 in [0, 1), (count,) float64."""
        return (self.words(count) >> np.uint64(11)) * np.float64(2.0**-53)

    def below(self, limit: int) -> int:
        """Return one integer in [0, limit), limit at most 2**63.

        >>> sorted({Entropy(s).below(3) for s in range(50)})
        [0, 1, 2]
        """
        mask = (1 << (limit - 1).bit_length()) - 1
        while True:
            value = int(self.words(1)[0]) & mask
            if value < limit:
                return value
