"""Peak memory of the server while 1,000 clients of models of 1.2 and 10 M parameters answer.

The networks are mnist_cnn (1,199,882 parameters) and an mlp (10,002,950). Clients send real bytes
through the local engine, of a random delta instead of a trained one, drawn once in each worker. The
mean streams: what is held does not grow with the clients. As many threads as workers decode. Every
row is a process of its own; its peak is ``VmHWM``, resident pages at their highest, libraries and
the memory that it shares with workers included. CPU time is that of the server's process, from the
first request to the new model: what it decodes per second is what it received by that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path
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
MODELS = {
    "small": ("model=small_cnn",),
    "1.2 M": ("model=mnist_cnn",),
    "10 M": ("model=mlp", "model.hidden=[3000,2540]"),
}
#: Models, codecs and clients of a round; the default codec's time is that of the clients' encoding.
ROWS = (
    *(("1.2 M", "identity", clients) for clients in (100, 1000)),
    ("1.2 M", "default", 100),
    *(("10 M", "identity", clients) for clients in (20, 1000)),
    ("10 M", "default", 20),
)
QUICK = tuple(("small", codec, clients) for codec in CODECS for clients in (4, 8))


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keeps finished rows, to go on with")
    parser.add_argument("--finished", action="store_true", help="write the rows in --work alone")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(**json.loads(options.row))))
        return
    rows = []
    for model, codec, clients in QUICK if options.quick else ROWS:
        row = {
            "model": model,
            "codec": codec,
            "clients": clients,
            "workers": options.workers,
            "seed": options.seed,
        }
        name = f"{model} {codec} {clients}"
        if options.finished and not _common.is_kept(options.work, name):
            continue
        rows.append(_common.kept(options.work, name, partial(separately, row)))
        print(rows[-1], file=sys.stderr)
    columns = {
        "model": "parameters",
        "codec": "codecs",
        "clients": "clients in the round",
        "start_mb": "server before the round, MB",
        "peak_mb": "peak, MB",
        "growth_mb": "growth, MB",
        "growth_models": "in float32 models",
        "worker_peak_mb": "largest worker, MB",
        "uplink_mb": "received, MB",
        "downlink_mb": "sent, MB",
        "seconds": "round, s",
        "server_cpu_s": "CPU of the server, s",
        "server_mb_s": "received per CPU second, MB",
        "ns_per_parameter": "ns per client and parameter",
    }
    worst = max(row["peak_mb"] for row in rows if row["model"] != "10 M")
    verdict = (
        f"With 1.2 M parameters the highest peak is {worst:.0f} MB; the limit is {LIMIT_MB} MB."
    )
    _common.write(
        options.out,
        "memory",
        "Memory of the server",
        [str(__doc__).strip(), _common.table(columns, rows), verdict],
        {"seed": options.seed, "limit_mb": LIMIT_MB, "rows": rows},
    )


def separately(row: dict[str, Any]) -> dict[str, Any]:
    """Measure a row in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--row", json.dumps(row)],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return {**row, **json.loads(done.stdout)}


def measure(codec: str, clients: int, workers: int, seed: int, model: str) -> dict[str, Any]:
    """Run one round with all clients; this process is the server."""
    experiment = config.load([*MODELS[model], f"seed={seed}", *CODECS[codec]])
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
        before_s = _common.cpu_seconds(os.getpid())
        _, report = fedq.run_round(grid, fedq.initial(weights))
        seconds = time.perf_counter() - start
        server_cpu_s = _common.cpu_seconds(os.getpid()) - before_s
        processes = _common.process_tree(os.getpid())[1:]
        worker_peak_mb = max(_common.peak_resident_mb(process) for process in processes)
    if report.replies != clients:
        raise RuntimeError(f"{report.replies} of {clients} replied: {report.reasons}")
    peak_mb = _common.peak_resident_mb()
    return {
        "start_mb": start_mb,
        "peak_mb": peak_mb,
        "growth_mb": peak_mb - start_mb,
        "growth_models": (peak_mb - start_mb) * 1e6 / (4 * layout.size),
        "parameters": layout.size,
        "worker_peak_mb": worker_peak_mb,
        "uplink_mb": report.uplink_bytes / 1e6,
        "downlink_mb": report.downlink_bytes / 1e6,
        "seconds": seconds,
        "server_cpu_s": server_cpu_s,
        "server_mb_s": report.uplink_bytes / 1e6 / server_cpu_s,
        "ns_per_parameter": 1e9 * server_cpu_s / (clients * layout.size),
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
