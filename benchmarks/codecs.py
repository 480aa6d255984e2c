"""Every registered codec on a client's real update: bytes, error, bias, speed.

The update is what a client sends: a few epochs of SGD on its own images, from a model that others
have trained for a while. Sizes are lengths of payloads. NMSE is ``|y - x|^2 / |x|^2``, over seeds;
``NMSE of the mean`` is that of the mean of all decoded vectors: an unbiased code brings it down to
the NMSE divided by the seeds, a biased one does not. The first two codecs are the main job's,
uplink and downlink (which sends weights, not updates: only its speed says something here). Speeds
are MB of float32 per second of CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import _common
import numpy as np
import torch
from numpy.typing import NDArray

import fedq
from fedq import config, registry, wire
from fedq.data.base import load
from fedq.layout import Layout
from fedq.training import trainer_for
from fedq.training_config import TrainingConfig

Vector = NDArray[np.float32]
MIN_SECONDS = 0.2


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--models", nargs="*", default=["small_cnn", "mnist_cnn"])
    parser.add_argument("--seeds", type=int, default=32, help="for NMSE and bias")
    options = parser.parse_args()
    if options.quick:
        options.models, options.seeds = ["mlp"], 2
    torch.set_num_threads(1)
    text, groups = [str(__doc__).strip()], []
    for model in options.models:
        x, layout = client_update(model, options.seed)
        seeds = options.seeds if x.size < 10**6 else max(2, options.seeds // 4)
        rows = [_memcpy(x), *(measure(codec, x, layout, seeds) for codec in examples())]
        groups.append({"model": model, "parameters": x.size, "seeds": seeds, "rows": rows})
        columns = {
            "codec": "codec",
            "bits_per_parameter": "bits/parameter",
            "header_bytes": "header, bytes",
            "nmse": "NMSE",
            "nmse_of_mean": "NMSE of the mean",
            "unbiased": "unbiased",
            "encode_mb_s": "encode, MB/s",
            "decode_mb_s": "decode, MB/s",
        }
        text += [
            f"## {model}, {x.size:,} parameters, {seeds} seeds",
            _common.table(columns, rows),
        ]
    _common.write(options.out, "codecs", "Codecs", text, {"seed": options.seed, "groups": groups})


def client_update(model: str, seed: int) -> tuple[Vector, Layout]:
    """Return one client's delta and its layout."""
    data = load(fedq.build("data", "mnist5k"))
    trainer = trainer_for(model, "none", data.input_shape, data.classes, seed=seed)
    rows = np.random.default_rng(seed).permutation(len(data.y_train))
    common, own = rows[:1000], rows[1000:1080]
    config = TrainingConfig(batch_size=10, learning_rate=0.05)
    trainer.train(data.train_inputs(common), data.y_train[common], config, seed)
    config = TrainingConfig(local_epochs=2, batch_size=10, learning_rate=0.05)
    trained = trainer.train(data.train_inputs(own), data.y_train[own], config, seed)
    return trained.delta, trainer.layout


def examples() -> Iterator[Any]:
    """Yield the main job's uplink and downlink, then every example of every registered codec."""
    job = config.load()
    yield job.codec
    yield job.downlink
    for name, cls in registry.table("codec").items():
        for options in cls.examples:
            yield fedq.build("codec", name, **options)


def measure(codec: Any, x: Vector, layout: Layout, seeds: int) -> dict[str, Any]:
    """Return a row of the table."""
    power = float(np.sum(np.square(x, dtype=np.float64)))
    total, errors, sizes = np.zeros(x.size), [], []
    for seed in range(seeds):
        payload = codec.encode(x, layout, seed)
        y = codec.decode(payload, layout)
        total += y
        sizes.append(len(payload))
        errors.append(float(np.sum(np.square(y.astype(np.float64) - x))) / power)
    header = len(payload) - len(wire.open_frame(payload, layout).body)
    return {
        "codec": registry.describe(codec),
        "config": registry.to_config(codec),
        "payload_bytes": statistics.fmean(sizes),
        "bits_per_parameter": 8 * statistics.fmean(sizes) / x.size,
        "header_bytes": header,
        "nmse": statistics.fmean(errors),
        "nmse_of_mean": float(np.sum(np.square(total / seeds - x))) / power,
        "unbiased": "yes" if codec.unbiased else "no",
        "encode_mb_s": _speed(lambda: codec.encode(x, layout, 0), x.nbytes),
        "decode_mb_s": _speed(lambda: codec.decode(payload, layout), x.nbytes),
    }


def _memcpy(x: Vector) -> dict[str, Any]:
    speed = _speed(x.copy, x.nbytes)
    return {"codec": "(copy in memory)", "encode_mb_s": speed, "decode_mb_s": speed}


def _speed(work: Callable[[], object], size: int) -> float:
    """Return the best MB of 10**6 bytes per CPU second of five spells."""
    work()
    best = 0.0
    for _ in range(5):
        calls, start = 0, time.process_time()
        while (spent := time.process_time() - start) < MIN_SECONDS / 5:
            work()
            calls += 1
        best = max(best, calls * size / spent / 1e6)
    return best


if __name__ == "__main__":
    main()
