"""Who is connected, and who of them is asked: no object per client, and no list of them.

Simulated nodes are a range of numbers, and a range is all that is kept of them. A cohort is drawn
by places among those that may be asked. Only where devices come and go is there an array of places
for a moment, 8 bytes each: their random order, in which they are tried until enough are there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from fedq import records  # noqa: F401

# isort: split
# After fedq.records, which sets what Flower reads at import.
from flwr.serverapp import Grid


class Nodes(Mapping[int, int]):
    """Places by node, in the order in which the nodes registered; place 0 is the first.

    Args:
      order: The nodes.

    Example:
      >>> nodes = Nodes(range(2, 1_000_002))
      >>> len(nodes), nodes[5], nodes.order[3], 1 in nodes
      (1000000, 3, 5, False)
    """

    def __init__(self, order: Sequence[int]) -> None:
        self.order = order
        self._places = None
        if not isinstance(order, range):
            self._places = {node: place for place, node in enumerate(order)}

    @classmethod
    def of(cls, grid: Grid) -> Nodes:
        """Return a grid's nodes; a range is in order, others say when they registered."""
        ids = grid.get_node_ids()
        if isinstance(ids, range):
            return cls(ids)
        ordered = sorted(grid.get_nodes(), key=lambda node: (node.registered_at, node.node_id))
        return cls([node.node_id for node in ordered])

    def __getitem__(self, node: int) -> int:
        """Return the place of a node."""
        if self._places is not None:
            return self._places[node]
        try:
            return self.order.index(node)
        except ValueError:
            raise KeyError(node) from None

    def __iter__(self) -> Iterator[int]:
        """Iterate over the nodes in order."""
        return iter(self.order)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.order)


def choose(
    nodes: Nodes,
    count: int,
    rng: np.random.Generator,
    barred: Collection[int] = (),
    there: Callable[[int], bool] | None = None,
) -> list[int]:
    """Draw nodes without replacement, in their order: as many as there are, if fewer.

    Args:
      nodes: All of them.
      count: How many are wanted.
      rng: Decides.
      barred: Nodes that are not to be drawn.
      there: Whether the node at a place can be asked; None if all can.

    Example:
      >>> choose(Nodes(range(2, 8)), 3, np.random.default_rng(0), barred=[3, 4])
      [5, 6, 7]
    """
    out = np.array(sorted(nodes[node] for node in barred if node in nodes), np.int64)
    free = len(nodes) - out.size
    if there is None:
        drawn = rng.choice(free, size=min(count, free), replace=False, shuffle=False)
    else:
        drawn = rng.permutation(free)
    # The i-th place that is free comes after all places that are out and have at most i free ones
    # before them.
    places = drawn + np.searchsorted(out - np.arange(out.size), drawn, side="right")
    if there is not None:
        present = (place for place in places if there(int(place)))
        places = np.array(list(islice(present, count)), np.int64)
    return [nodes.order[place] for place in np.sort(places).tolist()]
