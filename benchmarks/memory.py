"""Peak memory of the server while 1,000 clients of a model of 1.2 M parameters answer in one round.

The network is mnist_cnn (1,199,882 parameters). Clients send real bytes through the local engine,
of a random delta instead of a trained one, drawn once in each worker. The mean streams: what is
held does not grow with the clients. As many threads as workers decode. Every row is a process of
its own; its peak is ``VmHWM``, resident pages at their highest, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import cache
from typing import Any

import _common
import numpy as np

from fedq import config
from fedq.client import Task
from fedq.engines.local import LocalGrid
from fedq.layout import Layout, Vector
from fedq.models.base import create
from fedq.strategy import FedQ

# isort: split
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

LIMIT_MB = 600
CODECS = {
    "identity": ("codec=identity", "downlink=identity"),
    "default": (),
}


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(**json.loads(options.row))))
        return
    rows = []
    for codec in CODECS:
        for clients in (4, 8) if options.quick else (100, 1000):
            row = {
                "codec": codec,
                "clients": clients,
                "workers": options.workers,
                "seed": options.seed,
                "model": "small_cnn" if options.quick else "mnist_cnn",
            }
            done = subprocess.run(
                [sys.executable, __file__, "--row", json.dumps(row)],
                stdout=subprocess.PIPE,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            rows.append({**row, **json.loads(done.stdout)})
            print(rows[-1], file=sys.stderr)
    columns = {
        "codec": "codecs",
        "clients": "clients in the round",
        "start_mb": "server before the round, MB",
        "peak_mb": "peak, MB",
        "growth_mb": "growth, MB",
        "worker_peak_mb": "largest worker, MB",
        "uplink_mb": "received, MB",
        "downlink_mb": "sent, MB",
        "seconds": "round, s",
    }
    worst = max(row["peak_mb"] for row in rows)
    verdict = f"The highest peak is {worst:.0f} MB; the limit is {LIMIT_MB} MB."
    _common.write(
        options.out,
        "memory",
        "Memory of the server",
        [str(__doc__).strip(), _common.table(columns, rows), verdict],
        {"seed": options.seed, "limit_mb": LIMIT_MB, "rows": rows},
    )


def measure(codec: str, clients: int, workers: int, seed: int, model: str) -> dict[str, Any]:
    """Run one round with all clients; this process is the server."""
    experiment = config.load([f"model={model}", f"seed={seed}", *CODECS[codec]])
    network = create(experiment.model, (1, 28, 28), 10, seed)
    layout = Layout.of(dict(network.named_parameters()))
    weights = layout.flatten({n: p.detach().numpy() for n, p in network.named_parameters()})
    del network
    fedq = FedQ(
        layout=layout,
        codec=experiment.codec,
        downlink=experiment.downlink,
        clients_per_round=clients,
        seed=seed,
        threads=workers,
    )
    with LocalGrid(lambda: toy_client(layout), clients, workers=workers) as grid:
        start_mb, start = _common.peak_resident_mb(), time.perf_counter()
        _, report = fedq.run_round(grid, fedq.initial(weights))
        seconds = time.perf_counter() - start
        processes = _common.process_tree(os.getpid())[1:]
        worker_peak_mb = max(_common.peak_resident_mb(process) for process in processes)
    if report.replies != clients:
        raise RuntimeError(f"{report.replies} of {clients} replied: {report.reasons}")
    peak_mb = _common.peak_resident_mb()
    return {
        "start_mb": start_mb,
        "peak_mb": peak_mb,
        "growth_mb": peak_mb - start_mb,
        "worker_peak_mb": worker_peak_mb,
        "uplink_mb": report.uplink_bytes / 1e6,
        "downlink_mb": report.downlink_bytes / 1e6,
        "seconds": seconds,
    }


def toy_client(layout: Layout) -> ClientApp:
    """Return a ClientApp that answers with a delta like a trained one: small, of varied scale."""
    app = ClientApp()

    @cache
    def drawn_delta() -> Vector:
        rng = np.random.default_rng(0)
        delta = np.empty(layout.size, np.float32)
        for tensor in layout:
            scale = 0.01 * rng.lognormal(size=(tensor.rows, 1)) / np.sqrt(tensor.size)
            drawn = rng.standard_normal((tensor.rows, tensor.size // tensor.rows), np.float32)
            delta[tensor.slice] = (scale * drawn).astype(np.float32).ravel()
        return delta

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        return Task.open(message, layout).reply(drawn_delta(), examples=1, client=client)

    return app


if __name__ == "__main__":
    main()
