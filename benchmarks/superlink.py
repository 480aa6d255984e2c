"""What an idle device costs the SuperLink's database: a request for work, and a heartbeat.

Nodes are registered in the SQLite file that a SuperLink keeps, by Flower's own classes, in one
process and without its network. Then some of them ask for messages, of which there are none, and
say that they are alive. Figures are microseconds of CPU time per call, of one thread.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common

from fedq import records  # noqa: F401  (sets what Flower reads at import)

# isort: split
from flwr.server.superlink.fleet.vce.vce_api import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    NoOpFederationManager,
)
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.supercore.object_store import ObjectStoreFactory

INTERVAL_S = 30.0


def main() -> None:
    parser = _common.parser(__doc__)
    options = parser.parse_args()
    sizes, asked = ((20, 40), 10) if options.quick else ((1_000, 4_000), 500)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder, f"{nodes}.db"), nodes, asked) for nodes in sizes]
    columns = {
        "nodes": "registered nodes",
        "register_us": "registration, us",
        "poll_us": "request for work, us",
        "heartbeat_us": "heartbeat, us",
    }
    _common.write(
        options.out,
        "superlink",
        "An idle device at the SuperLink's database",
        [str(__doc__).strip(), _common.table(columns, rows)],
        {"seed": options.seed, "rows": rows},
    )


def measure(database: Path, nodes: int, asked: int) -> dict[str, Any]:
    """Register nodes in a new database, and let some of them ask."""
    manager, objects = NoOpFederationManager(), ObjectStoreFactory(str(database))
    state = LinkStateFactory(str(database), manager, objects).state()
    known: list[int] = []

    def register(_: int) -> None:
        key = secrets.token_bytes(32)
        known.append(state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, INTERVAL_S))

    register_us = per_call(register, nodes)
    stride = max(1, nodes // asked)
    return {
        "nodes": nodes,
        "register_us": register_us,
        "heartbeat_us": per_call(
            lambda i: state.acknowledge_node_heartbeat(known[i * stride], INTERVAL_S), asked
        ),
        "poll_us": per_call(lambda i: state.get_message_ins(known[i * stride], limit=1), asked),
    }


def per_call(call: Callable[[int], object], times: int) -> float:
    """Return microseconds of CPU time per call."""
    start = time.thread_time()
    for i in range(times):
        call(i)
    return 1e6 * (time.thread_time() - start) / times


if __name__ == "__main__":
    main()
