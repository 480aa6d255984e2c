"""Who shares masks with whom: a random regular graph (Bell et al. 2020, section 3.3)."""

from __future__ import annotations

import numpy as np

from fedq import random


def neighbourhoods(clients: int, degree: int, seed: int) -> list[list[int]]:
    """Return each client's neighbours and itself, sorted.

    A Harary graph on shuffled clients: each is joined to the ``degree / 2`` next ones on either
    side of a ring. ``degree >= clients - 1`` is the complete graph.

    >>> neighbourhoods(4, 9, seed=0)[2]
    [0, 1, 2, 3]
    >>> [len(near) for near in neighbourhoods(10, 4, seed=0)]
    [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    """
    if degree >= clients - 1:
        return [list(range(clients))] * clients
    words = random.words(seed, 2 * clients, "graph").view(np.uint64)
    ring = np.argsort(words, kind="stable").tolist()
    half = degree // 2
    result: list[list[int]] = [[] for _ in ring]
    for place, client in enumerate(ring):
        near = [ring[(place + offset) % clients] for offset in range(-half, half + 1)]
        result[client] = sorted(near)
    return result
