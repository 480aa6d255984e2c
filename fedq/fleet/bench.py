"""What a device can do: its profile, measured in a few seconds."""

from __future__ import annotations

import platform
import time
from typing import Any

import numpy as np

from fedq import config
from fedq.doctor import memory_bytes
from fedq.fleet import health
from fedq.threads import usable_cores

STEPS, REPEATS = 20, 5


def profile(model: str = "auto", codec: str = "dithered", seed: int = 0) -> dict[str, Any]:
    """Measure training, encoding and memory of this machine with one torch thread.

    Args:
      model: Trained on 28 x 28 grey images; as in ``fedq simulate model=...``.
      codec: What an update is encoded with.
      seed: Of images, weights and update.
    """
    from fedq import registry
    from fedq.models.cost import training_macs
    from fedq.training import trainer_for
    from fedq.training_config import TrainingConfig

    before_mb = health.memory_mb()
    experiment = config.load([f"model={model}", f"codec={codec}"])
    import torch

    torch.set_num_threads(1)
    shape = [1, 28, 28]
    trainer = trainer_for(
        registry.to_config(experiment.model),
        registry.to_config(experiment.quantization),
        shape,
        10,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    batch = experiment.batch_size
    x = rng.random((STEPS * batch, 1, 28, 28), np.float32)
    y = rng.integers(0, 10, len(x))
    training = TrainingConfig(local_epochs=1, batch_size=batch, learning_rate=0.01)
    weights, state = trainer.weights(), trainer.state()
    step_s = []
    for _ in range(REPEATS):
        trainer.load(weights, state)
        start = time.perf_counter()
        delta = trainer.train(x, y, training, seed).delta
        step_s.append((time.perf_counter() - start) / STEPS)
    codec_ = experiment.codec
    payload = codec_.encode(delta, trainer.layout, seed)  # compiles
    encode_s, decode_s = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        payload = codec_.encode(delta, trainer.layout, seed)
        middle = time.perf_counter()
        codec_.decode(payload, trainer.layout)
        encode_s.append(middle - start)
        decode_s.append(time.perf_counter() - middle)
    step, size = float(np.median(step_s)), 4 * trainer.layout.size
    return {
        "machine": platform.machine(),
        "cores": usable_cores(),
        "memory_mb": memory_bytes()[0] // 10**6,
        "parameters": trainer.layout.size,
        "batch_size": batch,
        "step_ms": round(1e3 * step, 3),
        "images_s": round(batch / step, 1),
        "training_macs_s": round(training_macs(trainer.model, shape) * batch / step),
        "encode_mb_s": round(size / float(np.median(encode_s)) / 1e6, 2),
        "decode_mb_s": round(size / float(np.median(decode_s)) / 1e6, 2),
        "payload_bytes": len(payload),
        "start_mb": before_mb,
        "peak_mb": health.peak_mb(),
    }
