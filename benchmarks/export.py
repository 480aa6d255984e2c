"""int8 beside float in every runtime that is installed, for every model of the zoo.

Each network is trained briefly on real data with int8 QAT, exported, executed and compared as
``fedq export`` does it. Latency is CPU time of one invocation, batch 1, one thread; float and int8
take turns. Sizes are those of the files.

    python benchmarks/export.py [--exporters litert,onnx] [--models mlp,imu_cnn]
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import parser, table, write

import fedq
from fedq import registry
from fedq.data.base import Dataset, load
from fedq.errors import ConfigError, FedqError
from fedq.export._release import release
from fedq.export._source import Source
from fedq.models import create
from fedq.training import Trainer
from fedq.training_config import TrainingConfig

#: What each model is trained on: data that is available without a network.
DATA = {"imu_cnn": "smartwatch"}
#: Where narrow weights are measured, too: their latency is that of int8.
NARROW = ("litert",)
COLUMNS = {
    "model": "Model",
    "runtime": "Runtime",
    "float_us": "float, µs",
    "int8_us": "int8, µs",
    "speed_up": "speed-up",
    "float_kb": "float, kB",
    "int8_kb": "int8, kB",
    "packed_kb": "packed, kB",
    "float_accuracy": "float, %",
    "accuracy": "int8, %",
    "agreement": "agreement, %",
    "steps": "steps",
    "memory_mb": "process, MB",
}


#: A choice among others, and what classifies nothing.
OTHERS = ("auto", "autoencoder", "tcn")


def trained(model: str, quantization: Any, epochs: int, seed: int) -> Source:
    """Return a model trained on all data of one source in one place."""
    source = DATA.get(model, "mnist5k")
    try:
        dataset = load(fedq.build("data", source))
    except (ConfigError, ImportError) as error:
        raise SystemExit(f"model {model} needs data={source}: {error}") from error
    network = create(fedq.build("model", model), dataset.input_shape, dataset.classes, seed)
    trainer = Trainer(quantization.prepare(network))
    trainer.load(trainer.weights())
    rows = np.arange(len(dataset.x_train))
    config = TrainingConfig(local_epochs=epochs, batch_size=32, learning_rate=0.05)
    trainer.train(dataset.train_inputs(rows), dataset.y_train, config, seed)
    return Source(trainer.model.eval(), quantization, dataset, 0)


def limited(source: Source, examples: int) -> Source:
    """Return the source with fewer test examples: some runtimes are slow references here."""
    old = source.dataset
    dataset = Dataset.of(
        old.x_train,
        old.y_train,
        old.x_test[:examples],
        old.y_test[:examples],
        kind=old.kind,
    )
    return Source(source.network, source.quantization, dataset, 0)


def installed(name: str) -> bool:
    """Whether a runtime can be measured here."""
    exporter = fedq.build("exporter", name)
    return all(importlib.util.find_spec(m.split(".")[0]) is not None for m in exporter.modules)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--exporters", help="these alone, by name")
    options.add_argument("--models", help="these alone, by name")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    names = (
        arguments.exporters.split(",")
        if arguments.exporters
        else list(registry.available("exporter"))
    )
    exporters = [fedq.build("exporter", name) for name in names if installed(name)]
    models = (
        arguments.models.split(",")
        if arguments.models
        else [name for name in registry.available("model") if name not in OTHERS]
    )
    if arguments.quick:
        models = models[:1]
    rows, reports = [], []
    widths = [8] if arguments.quick else [8, 4, 2]
    for model in models:
        for bits in widths:
            quantization = fedq.build(
                "quantization", "uniform", weight_bits=bits, first_last_bits=max(bits, 4)
            )
            source = trained(model, quantization, 1 if arguments.quick else 3, arguments.seed)
            if arguments.quick:
                source = limited(source, 50)
            for exporter in exporters:
                if bits < 8 and exporter.name not in NARROW:
                    continue
                label = f"{model}, {bits} bit" if bits < 8 else model
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        report = release(source, exporter, Path(folder)).report
                    except FedqError as error:
                        rows.append({"model": label, "runtime": f"{exporter.name}: {error}"})
                        continue
                reports.append({"model": model, "weight_bits_asked": bits, **report})
                rows.append(row(label, report))
                print(rows[-1], flush=True)
                gc.collect()
    write(
        arguments.out,
        "export",
        "int8 and float in the devices' runtimes",
        [
            "One network per model, trained for "
            f"{1 if arguments.quick else 3} epochs with QAT in one place; the first and the last"
            " layer have at least 4 bits. Latency: CPU time of one invocation, batch 1, one thread,"
            " the fastest of nine turns, float and int8 in turns."
            " `c` is TensorFlow Lite Micro with its portable reference kernels on this machine:"
            " its times compare with nothing but each other. `tensorrt` is executed by ONNX"
            " Runtime, in float between quantizations: no latency of TensorRT.",
            table(COLUMNS, rows),
        ],
        {"reports": reports},
    )


def row(label: str, report: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""
    packed = report["packed_bytes"]
    return {
        "model": label,
        "runtime": report["exporter"],
        "float_us": report["float_latency_us"],
        "int8_us": report["latency_us"],
        "speed_up": report["float_latency_us"] / report["latency_us"],
        "float_kb": report["float_bytes"] / 1000,
        "int8_kb": report["bytes"] / 1000,
        "packed_kb": None if packed is None else packed / 1000,
        "float_accuracy": f"{100 * report['float_accuracy']:.1f}",
        "accuracy": f"{100 * report['accuracy']:.1f}",
        "agreement": f"{100 * report['parity']['agreement']:.2f}",
        "steps": report["parity"]["largest_difference_steps"],
        "memory_mb": report["memory"].get("process_mb"),
    }


if __name__ == "__main__":
    main()
