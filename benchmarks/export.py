"""int8 beside float in every runtime that is installed, for every model of the zoo.

Each network is trained in float on real data (or a generator of the zoo's experiments), then with
the quantizers of 8, 4 and 2 bits for a while, converted, written, executed and compared as
``fedq export`` does it, on the whole test set. ``integers`` is the integer graph computed exactly,
without a runtime. `agreement` is the share of test examples with the same class as the network with
fake quantizers; where outputs are no classes, of outputs within one step. `steps` is the largest
difference of an output, in steps of its grid. Both are to the network as trained; `device` are
steps to the same network with the int32 biases that devices hold, as the parity gate has them. For
``tensorrt``, which has other grids, all are to the integers on these.

Latency is CPU time of one invocation, batch 1, one thread: the fastest of 25 turns that float and
int8 take; `speed-up` is the median of the ratios within turns. Sizes are those of the files. ``c``
is TensorFlow Lite Micro with its portable reference kernels: its times compare with nothing but
each other. ``tensorrt`` is executed by ONNX Runtime, in float between quantizations: no latency of
TensorRT.

    python benchmarks/export.py --words FOLDER   # FOLDER: DIGIT_SPEAKER_N.wav, for ds_cnn
    python benchmarks/export.py --exporters litert,onnx --models mlp,imu_cnn

The results file has a record per model, width, runtime and processor, with its date; a rerun,
perhaps on another machine or in an environment with other runtimes, adds what is missing (`--again`
measures all anew). Trained networks are kept below `--work`. Records of 2026-11-24 are of networks
that were trained for three epochs.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import earlier_cells, parser, table, when_and_where, write
from safetensors.torch import load_file, save_file
from torch import nn

import fedq
from fedq import config, registry
from fedq.data.base import Dataset, load
from fedq.errors import ConfigError, FedqError
from fedq.export import _reference
from fedq.export._convert import convert, with_device_biases
from fedq.export._gate import Parity, ParityError, parity_of
from fedq.export._release import release
from fedq.export._source import Source, outputs, source
from fedq.export.base import Exporter, Operators
from fedq.metrics import Metric
from fedq.models import create
from fedq.training import Trainer
from fedq.training_config import TrainingConfig

WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedq" / "export"
#: Presets by weight bits.
WIDTHS = {8: "int8", 4: "w4a8", 2: "w2a8"}
#: Where narrow weights are executed, too: their latency is that of int8.
NARROW = ("litert", "onnx")
INTEGERS = "integers"
#: Models that are factored, at what share of the weights' energy; and for which runtime.
FACTORED, ENERGIES, FACTORED_FOR = ("small_cnn", "mnist_cnn"), (0.95, 0.9, 0.8, 0.6), "litert"


@dataclass(frozen=True)
class Subject:
    """What a model is trained on, and how long: passes in float, then with quantizers."""

    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 6
    after: int = 2
    learning_rate: float = 0.05
    momentum: float = 0.9
    enlarged: int = 1  # pixels become so many each way


#: The zoo, but ``auto`` and ``local_head``, which build one of these.
SUBJECTS = {
    "mlp": Subject("mnist5k"),
    "small_cnn": Subject("mnist5k"),
    "mnist_cnn": Subject("mnist5k", epochs=4),
    "low_rank": Subject("mnist5k"),
    "imu_cnn": Subject("smartwatch", epochs=20, after=5),
    "tcn": Subject("energy", epochs=6),
    "autoencoder": Subject("vibration", epochs=10, learning_rate=0.1, momentum=0.0),
    "ds_cnn": Subject("spoken_digits", {"held_out": 15}, epochs=10, learning_rate=0.03),
    "resnet8": Subject("mnist5k", epochs=3, learning_rate=0.03),
    "mobilenet": Subject("mnist5k", epochs=4, after=1, learning_rate=0.03, enlarged=2),
}
QUICK = dataclasses.replace(SUBJECTS["mlp"], epochs=1, after=1)
COLUMNS = {
    "model": "Model",
    "bits": "weights, bits",
    "runtime": "Runtime",
    "agreement": "agreement, %",
    "steps": "steps",
    "device_steps": "device",
    "metric": "metric",
    "float_score": "float",
    "trained_score": "trained",
    "score": "executed",
    "float_us": "float, µs",
    "int8_us": "int8, µs",
    "speed_up": "speed-up",
    "float_kb": "float, kB",
    "int8_kb": "int8, kB",
    "packed_kb": "packed, kB",
    "memory_mb": "process, MB",
}


def data_of(subject: Subject, words: str | None) -> Dataset:
    """Return a subject's data."""
    options = dict(subject.options)
    if subject.data == "spoken_digits":
        if words is None:
            raise SystemExit("ds_cnn needs --words FOLDER, of DIGIT_SPEAKER_N.wav")
        options["path"] = words
    try:
        dataset = load(fedq.build("data", subject.data, **options))
    except (ConfigError, ImportError) as error:
        raise SystemExit(f"this needs data={subject.data}: {error}") from error
    large = {
        name: getattr(dataset, name).repeat(subject.enlarged, 1).repeat(subject.enlarged, 2)
        for name in ("x_train", "x_test")
        if subject.enlarged > 1
    }
    return dataclasses.replace(dataset, **large)


class Networks:
    """Trained networks of one seed, kept on disk."""

    def __init__(self, work: Path, seed: int, words: str | None) -> None:
        self.work, self.seed, self.words = work, seed, words

    def source(self, model: str, subject: Subject, bits: int) -> Source:
        """Return a network trained with quantizers, from the one in float."""
        dataset = data_of(subject, self.words)
        quantization = config.load([f"quantization={WIDTHS[bits]}"]).quantization
        network = create(fedq.build("model", model), dataset.input_shape, dataset.outputs)
        prepared = quantization.prepare(network)

        def trained() -> nn.Module:
            start = copy.deepcopy(self.float_twin(model, subject, dataset))
            rate = subject.learning_rate / 5
            return self._train(quantization.prepare(start), subject, dataset, subject.after, rate)

        self._kept(f"{model} {subject} {registry.to_config(quantization)}", prepared, trained)
        return Source(prepared.eval(), quantization, dataset, 0)

    def float_twin(self, model: str, subject: Subject, dataset: Dataset) -> nn.Module:
        """Return the network trained in float."""
        network = create(
            fedq.build("model", model), dataset.input_shape, dataset.outputs, self.seed
        )

        def trained() -> nn.Module:
            start, rate = copy.deepcopy(network), subject.learning_rate
            return self._train(start, subject, dataset, subject.epochs, rate)

        self._kept(f"{model} {subject}", network, trained)
        return network

    def _kept(self, what: str, network: nn.Module, trained: Any) -> None:
        """Fill a network with what was trained, now or before."""
        digest = hashlib.sha256(f"{what} {self.seed}".encode()).hexdigest()[:12]
        path = self.work / f"{what.split()[0]}-{digest}.safetensors"
        if not path.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            tensors = {n: t.clone().contiguous() for n, t in trained().state_dict().items()}
            save_file(tensors, path)
        network.load_state_dict(load_file(path))

    def _train(
        self, network: nn.Module, subject: Subject, dataset: Dataset, epochs: int, rate: float
    ) -> nn.Module:
        trainer = Trainer(network, registry.from_config("task", dataset.task))
        trainer.load(trainer.weights(), trainer.state())
        x = dataset.train_inputs(np.arange(len(dataset.x_train)))
        options: dict[str, Any] = {"batch_size": 32, "momentum": subject.momentum}
        for share, factor in ((epochs - epochs // 3, 1.0), (epochs // 3, 0.2)):
            if share:
                step = TrainingConfig(local_epochs=share, learning_rate=factor * rate, **options)
                trainer.train(x, dataset.y_train, step, self.seed)
        return trainer.model.eval()


def installed() -> list[Exporter]:
    """Return the exporters whose runtimes can be measured here."""
    found = [fedq.build("exporter", name) for name in registry.available("exporter")]
    return [
        exporter
        for exporter in found
        if all(importlib.util.find_spec(m.split(".")[0]) is not None for m in exporter.modules)
    ]


def compared(trained: Parity, device: Parity) -> dict[str, Any]:
    """Return the figures of comparisons with both networks."""
    return {
        "examples": trained.examples,
        "agreement": trained.agreement,
        "steps": trained.largest_steps,
        "moved": trained.moved,
        "device_agreement": device.agreement,
        "device_steps": device.largest_steps,
        "device_moved": device.moved,
    }


def integers(source: Source) -> dict[str, Any]:
    """Return how the integer graph, computed exactly, compares with training."""
    graph = convert(source.network, source.dataset.input_shape)
    x, y = source.dataset.test_inputs(), source.dataset.y_test
    expected, logits = source.logits(x), _reference.logits(graph, x)
    held = outputs(with_device_biases(source.network, source.dataset.input_shape), x)
    classes = source.dataset.classes > 0
    trained, device = (
        parity_of(logits, each, graph, Operators({}), classes=classes) for each in (expected, held)
    )
    metric = source.task.metric
    return {
        **compared(trained, device),
        "metric": metric.name,
        "score": source.task.evaluate(logits, x, y),
        "trained_score": source.task.evaluate(expected, x, y),
        "parameters": sum(op.weights.values.size for op in graph.weighted),
        "multiplications": graph.multiplications,
    }


def executed(source: Source, exporter: Exporter) -> dict[str, Any]:
    """Return what a runtime makes of a network; of one that the gate refuses, why."""
    metric = source.task.metric
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = release(source, exporter, Path(folder)).report
        except ParityError as error:
            figures = compared(error.trained or error.parity, error.parity)
            return {**figures, "refused": str(error).partition(": ")[2]}
        except FedqError as error:
            return {"refused": str(error)}
    parity = report["parity"]
    own = exporter.name == "tensorrt"
    return {
        "examples": parity["examples"],
        "agreement": parity["agreement" if own else "agreement_with_training"],
        "steps": parity["largest_difference_steps" if own else "steps_from_training"],
        "device_agreement": parity["agreement"],
        "device_steps": parity["largest_difference_steps"],
        "device_moved": parity["logits_that_differ"],
        "integer_operators": parity["integer_operators"],
        "metric": metric.name,
        "score": report[metric.name],
        "trained_score": report[f"trained_{metric.name}"],
        "float_score": report[f"float_{metric.name}"],
        **{key: report[key] for key in _KEPT},
        "memory": report["memory"],
        "runtime_version": report["runtime"],
    }


def factored(networks: Networks, model: str, subject: Subject, energy: float) -> dict[str, Any]:
    """Return what factors of a float network cost and save, as ``fedq export --factorise``."""
    experiment = config.load([f"data={subject.data}", f"model={model}"])
    whole = networks.float_twin(model, subject, data_of(subject, networks.words))
    tensors = {name: tensor.numpy() for name, tensor in whole.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            given = source(experiment, tensors, experiment.quantization, energy=energy)
            exporter = fedq.build("exporter", FACTORED_FOR)
            report = release(given, exporter, Path(folder), steps=2).report
        except FedqError as error:
            return {"refused": str(error)}
    return {
        **{key: report[key] for key in ("factored", "parameters", "accuracy", *_KEPT)},
        "steps": report["parity"]["largest_difference_steps"],
    }


_KEPT = (
    *("latency_us", "float_latency_us", "speed_up"),
    *("bytes", "float_bytes", "packed_bytes"),
)


def row(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""
    shown = {key: cell[key] for key in ("model", "bits", "runtime")}
    if "agreement" in cell:
        shown["agreement"] = f"{100 * cell['agreement']:.2f}"
        shown |= {key: cell.get(key) for key in ("steps", "device_steps")}
    if "refused" in cell:
        return {**shown, "metric": f"refused: {cell['refused']}"}
    metric: Metric = metric_named(cell["metric"])
    shown["metric"] = metric.title + (", %" if metric.percent else "")
    for key in ("float_score", "trained_score", "score"):
        if key in cell:
            shown[key] = f"{metric.scale * cell[key]:.4g}"
    if cell["runtime"] == INTEGERS:
        return shown
    packed = cell["packed_bytes"]
    return shown | {
        "float_us": cell["float_latency_us"],
        "int8_us": cell["latency_us"],
        "speed_up": cell["speed_up"],
        "float_kb": cell["float_bytes"] / 1000,
        "int8_kb": cell["bytes"] / 1000,
        "packed_kb": None if packed is None else packed / 1000,
        "memory_mb": cell["memory"].get("process_mb"),
    }


FACTORED_COLUMNS = {
    "model": "Model",
    "energy": "energy kept",
    "parameters": "weights",
    "accuracy": "accuracy, %",
    "kb": "int8, kB",
    "int8_us": "int8, µs",
    "steps": "steps",
}


def factored_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the table of factors, beside what they were made of."""
    shown = {"model": cell["model"], "energy": f"{cell['energy']:g}"}
    if "refused" in cell:
        return {**shown, "accuracy": f"refused: {cell['refused']}"}
    before = cell["factored"]
    return shown | {
        "parameters": f"{before['parameters']:,} → {cell['parameters']:,}",
        "accuracy": f"{100 * before['trained_accuracy']:.1f} → {100 * cell['accuracy']:.1f}",
        "kb": f"{before['whole_bytes'] / 1000:.1f} → {cell['bytes'] / 1000:.1f}",
        "int8_us": cell["latency_us"],
        "steps": cell["steps"],
    }


def metric_named(name: str) -> Metric:
    """Return a task's metric."""
    found = {build.metric.name: build.metric for build in registry.table("task").values()}  # type: ignore[attr-defined]
    metric: Metric = found[name]
    return metric


def here() -> dict[str, str]:
    """Return the date and the processor, with whether it multiplies int8."""
    found = when_and_where()
    flags = Path("/proc/cpuinfo")
    vnni = flags.exists() and re.search(r"\b(avx512_vnni|avx_vnni)\b", flags.read_text())
    return {**found, "cpu": found["cpu"] + (" with VNNI" if vnni else "")}


def report(out: Path, cells: list[dict[str, Any]]) -> None:
    """Write the results so far."""
    order = list(SUBJECTS)
    cells.sort(key=lambda c: (order.index(c["model"]), -c["bits"], c["runtime"] != INTEGERS))
    text = [str(__doc__).strip()]
    for cpu in sorted({cell["cpu"] for cell in cells}):
        plain = [cell for cell in cells if "energy" not in cell and cell["cpu"] == cpu]
        dates = sorted({cell["date"] for cell in plain})
        text += [f"## {cpu}, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}"]
        text += [table(COLUMNS, map(row, plain))]
    thin = [factored_row(cell) for cell in cells if "energy" in cell]
    if thin:
        text += [f"## Factors, for {FACTORED_FOR}, of the same float networks"]
        text += [table(FACTORED_COLUMNS, thin)]
    write(out, "export", "int8 and float in the devices' runtimes", text, {"cells": cells})


def main() -> None:
    """Measure all cells and write the results."""
    options = parser(__doc__)
    options.add_argument("--exporters", help="these alone, by name")
    options.add_argument("--models", help="these alone, by name")
    options.add_argument("--words", help="folder of DIGIT_SPEAKER_N.wav, for ds_cnn")
    options.add_argument("--work", type=Path, default=WORK, help="where networks are kept")
    options.add_argument("--again", action="store_true", help="measure all anew")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    exporters = installed()
    if arguments.exporters:
        exporters = [e for e in exporters if e.name in arguments.exporters.split(",")]
    subjects, widths = dict(SUBJECTS), list(WIDTHS)
    if arguments.models:
        subjects = {name: SUBJECTS[name] for name in arguments.models.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.quick:
            subjects, widths, arguments.work = {"mlp": QUICK}, widths[:1], Path(folder)
        every = {**SUBJECTS, **subjects}
        settings = {name: f"{subject} seed {arguments.seed}" for name, subject in every.items()}
        cells = earlier(arguments.out, settings)
        cpu = {"cpu": here()["cpu"]}
        done = {
            (c["model"], c["bits"], c["runtime"], c.get("energy")) for c in cells if c | cpu == c
        }
        networks = Networks(arguments.work, arguments.seed, arguments.words)
        for model, subject in subjects.items():
            for bits in widths:
                todo = [INTEGERS, *(e.name for e in exporters if bits == 8 or e.name in NARROW)]
                todo = [
                    name
                    for name in todo
                    if arguments.again or (model, bits, name, None) not in done
                ]
                if not todo:
                    continue
                source = networks.source(model, subject, bits)
                if arguments.quick:
                    source = limited(source, 50)
                for name in todo:
                    key = {"model": model, "bits": bits, "runtime": name}
                    measured = (
                        integers(source)
                        if name == INTEGERS
                        else executed(source, fedq.build("exporter", name))
                    )
                    cells = without(cells, {**key, **cpu, "energy": None})
                    about = {"settings": settings[model], **here()}
                    cells.append({**key, **measured, **about})
                    print(row(cells[-1]), flush=True)
                    gc.collect()
                report(arguments.out, cells)
        if FACTORED_FOR in {exporter.name for exporter in exporters} and not arguments.quick:
            for model, energy in itertools.product(FACTORED, ENERGIES):
                key = {"model": model, "bits": 8, "runtime": FACTORED_FOR, "energy": energy}
                if model in subjects and (arguments.again or tuple(key.values()) not in done):
                    measured = factored(networks, model, subjects[model], energy)
                    about = {"settings": settings[model], **here()}
                    cells = [*without(cells, {**key, **cpu}), {**key, **measured, **about}]
                    report(arguments.out, cells)


def earlier(out: Path, settings: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the cells of the same settings, and those of other processors."""
    own, path = earlier_cells(out, "export", settings, "model"), out / "export.json"
    every = json.loads(path.read_text()).get("cells", []) if path.exists() else []
    cpu = here()["cpu"]
    return [cell for cell in every if cell in own or cell["cpu"] != cpu]


def without(cells: list[dict[str, Any]], key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cells but the one that is measured anew."""
    return [cell for cell in cells if any(cell.get(k) != v for k, v in key.items())]


def limited(given: Source, examples: int) -> Source:
    """Return the source with fewer test examples: some runtimes are slow references here."""
    data = given.dataset
    few = dataclasses.replace(data, x_test=data.x_test[:examples], y_test=data.y_test[:examples])
    return dataclasses.replace(given, dataset=few)


if __name__ == "__main__":
    main()
