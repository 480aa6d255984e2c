"""Edge aggregators: bytes, CPU time and error of the second hop.

40 deltas of 1,199,882 parameters (those of mnist_cnn, drawn like trained ones: small, of varied
scale by row) go to 4 edges; each edge sums its ten exactly, with weights, and forwards one real
message, which the server opens and adds up. CPU time is of one thread: that of the edges from the
full sum to the sealed message, per edge and parameter, and that of the server from the sealed
message to its own sum. The error is that of the mean of all, against the exact mean of the same
deltas: ``|mean - exact|^2 / |exact|^2``.
"""

from __future__ import annotations

import time
from typing import Any

import _common
import numpy as np

from fedq import build, registry
from fedq.layout import Layout, Vector
from fedq.models.base import create
from fedq.random import derive, generator
from fedq.topologies.tree import Edges, Tree

DITHERED = {"rounding": "dithered", "scale": "model"}
CODECS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"name": "identity"},
    {"name": "fp16"},
    {"name": "uniform", "bits": 8, **DITHERED},
    {"name": "uniform", "bits": 5, **DITHERED},
    {"name": "dtcq", "bits": 1.0},
)


def main() -> None:
    parser = _common.parser(__doc__)
    options = parser.parse_args()
    clients, edges, model = (8, 2, "small_cnn") if options.quick else (40, 4, "mnist_cnn")
    network = create(build("model", model), (1, 28, 28), 10, options.seed)
    layout = Layout.of(dict(network.named_parameters()))
    deltas = [drawn(layout, derive(options.seed, client)) for client in range(clients)]
    rows = []
    for config in CODECS:
        measure(layout, deltas, edges, config, options.seed)  # kernels are compiled
        rows.append(measure(layout, deltas, edges, config, options.seed))
    columns = {
        "codec": "topology.codec",
        "bits_per_parameter": "forwarded, bit per parameter",
        "saved": "clients' float32 bytes / forwarded",
        "edge_ns": "edge, ns per parameter",
        "server_ns": "server, ns per edge and parameter",
        "nmse": "error",
    }
    _common.write(
        options.out,
        "tree",
        "Edge aggregators",
        [str(__doc__).strip(), _common.table(columns, rows)],
        {"seed": options.seed, "parameters": layout.size, "rows": rows},
    )


def measure(
    layout: Layout, deltas: list[Vector], edges: int, config: dict[str, Any] | None, seed: int
) -> dict[str, Any]:
    """Run the second hop of one round."""
    clients = len(deltas)
    codec = None if config is None else registry.from_config("codec", config)
    tree = Tree(edges=edges, codec=codec)
    served = [tree.edge(client, clients) for client in range(clients)]
    round_ = Edges(tree, layout, [], seed, 1, served)
    for client, delta in enumerate(deltas):
        round_.delta.add(delta, 40.0 + client, client)
    spent = Spent(round_)
    round_.forward()
    per_parameter = 1e9 / (edges * layout.size)
    return {
        "codec": "null" if codec is None else registry.describe(codec),
        "clients": clients,
        "edges": edges,
        "bits_per_parameter": 8 * round_.uplink_bytes / (edges * layout.size),
        "saved": 4 * clients * layout.size / round_.uplink_bytes,
        "edge_ns": spent.sending_s * per_parameter,
        "server_ns": spent.receiving_s * per_parameter,
        "nmse": round_.nmse,
    }


class Spent:
    """CPU seconds of the two ends of the second hop."""

    def __init__(self, edges: Edges) -> None:
        self.sending_s = self.receiving_s = 0.0
        send, receive = edges._message, edges._receive

        def sending(edge: int) -> bytes:
            start = time.thread_time()
            blob = send(edge)
            self.sending_s += time.thread_time() - start
            return blob

        def receiving(blob: bytes) -> None:
            start = time.thread_time()
            receive(blob)
            self.receiving_s += time.thread_time() - start

        edges._message, edges._receive = sending, receiving  # type: ignore[method-assign]


def drawn(layout: Layout, seed: int) -> Vector:
    """Return a delta like a trained one."""
    rng = generator(seed)
    delta = np.empty(layout.size, np.float32)
    for tensor in layout:
        scale = 0.01 * rng.lognormal(size=(tensor.rows, 1)) / np.sqrt(tensor.size)
        values = rng.standard_normal((tensor.rows, tensor.size // tensor.rows), np.float32)
        delta[tensor.slice] = (scale * values).astype(np.float32).ravel()
    return delta


if __name__ == "__main__":
    main()
