"""Secure aggregation: the server learns the sum of integer updates, and no update.

Each client masks its integers with one keystream for every other client, which cancel in the sum,
and one of its own, which the others' shares uncover at the end (Bonawitz et al. 2017, over the
random graph of Bell et al. 2020). Nothing here knows a network: :class:`Party` and
:class:`Coordinator` take bytes and return bytes.
"""

from fedq.secagg._codes import Codes
from fedq.secagg._coordinator import AbortedError, Coordinator
from fedq.secagg._grid import Grid
from fedq.secagg._messages import PHASES, Announcement, binding, run_name
from fedq.secagg._party import Party, RefusedError
from fedq.secagg.base import SecureAggregation

__all__ = [
    "PHASES",
    "AbortedError",
    "Announcement",
    "Codes",
    "Coordinator",
    "Grid",
    "Party",
    "RefusedError",
    "SecureAggregation",
    "binding",
    "run_name",
]
