"""From a network to a released file: write, execute, compare, measure, and only then rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import fedq
from fedq import registry
from fedq.errors import ConfigError, FedqError
from fedq.export import _gate, _measure, _packing, _reference, runner
from fedq.export._convert import convert, with_device_biases
from fedq.export._graph import Graph
from fedq.export._source import Source, outputs
from fedq.export.base import Exporter

REPORT, RUNNER = "export.json", "runner.py"
#: Told the number of a step, how many there are, and what it does.
Watch = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Released:
    """Where a file lies, and its report: the content of ``export.json``."""

    path: Path
    report: dict[str, Any]


def release(
    source: Source,
    exporter: Exporter,
    folder: Path,
    watch: Watch = lambda *step: None,
    steps: int = _gate.STEPS,
) -> Released:
    """Write a network for a runtime, and release it if it passes the parity gate.

    ``folder`` gets the model, ``export.json``, a copy of the runner, and a packed model if weights
    have fewer than 8 bits. Whatever an earlier export left there stays if this one fails.

    Args:
      source: The network, and its test set.
      exporter: The runtime.
      folder: Made if it is not there.
      watch: Told what is being done.
      steps: Largest difference of a logit that passes, in steps of the output's grid.

    Raises:
      ConfigError: If the runtime is not installed, or the network has no integer form.
      ParityError: If the file does not compute what was trained.
    """
    exporter.check()
    watch(0, 4, f"{exporter.name}: converting")
    trained = convert(source.network, source.dataset.input_shape)
    _check_grids(trained)
    graph = exporter.adapt(trained)
    x, y = source.dataset.test_inputs(), source.dataset.y_test
    expected = source.logits(x)
    if graph is trained:
        simulated = outputs(with_device_biases(source.network, source.dataset.input_shape), x)
    else:  # other grids than those of training: the file is held to these
        simulated = _reference.logits(graph, x)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=folder, prefix=".unreleased-")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error
    with place as name:
        temporary = Path(name)
        model, twin = temporary / exporter.file, temporary / "float" / exporter.file
        twin.parent.mkdir()
        watch(1, 4, f"{exporter.name}: writing")
        exporter.write(graph, model, integer=True)
        exporter.write(graph, twin, integer=False)
        packed = _packed(exporter, graph, model)
        size = len(packed) if packed is not None else exporter.size(model)
        whole = _whole(source, exporter, temporary / "whole", size) if source.whole else None
        watch(2, 4, f"{exporter.name}: executing")
        classes = source.dataset.classes > 0
        parity = _gate.compare(exporter, model, graph, x, simulated, classes=classes)
        aside = _gate.parity_of(parity.logits, expected, trained, parity.operators, classes=classes)
        _gate.check(parity, aside if graph is trained else None, graph, exporter, steps)
        float_logits = _gate.run(exporter, twin, x)
        watch(3, 4, f"{exporter.name}: measuring")
        task = source.task
        metric = task.metric.name
        report: dict[str, Any] = {
            "file": exporter.file,
            "exporter": exporter.name,
            "runtime": {exporter.runtime: metadata.version(exporter.runtime)},
            "device": exporter.device,
            "fedq": fedq.__version__,
            "quantization": registry.to_config(source.quantization),
            "calibrated_on_examples": source.calibrated,
            "input": _input(source, graph, exporter),
            "task": dict(source.dataset.task),
            "output": {"values": source.dataset.outputs, **_grid(graph.output.grid)},
            metric: task.evaluate(parity.logits, x, y),
            f"trained_{metric}": task.evaluate(expected, x, y),
            f"float_{metric}": task.evaluate(float_logits, x, y),
            "parity": {
                "examples": parity.examples,
                "agreement": parity.agreement,
                "agreement_with_training": aside.agreement,
                "largest_difference_steps": parity.largest_steps,
                "steps_from_training": aside.largest_steps,
                "logits_that_differ": parity.moved,
                "integer_operators": dict(parity.operators.integer),
                "float_operators": dict(parity.operators.fallback),
            },
            "parameters": sum(op.weights.values.size for op in graph.weighted),
            "multiplications": graph.multiplications,
            "weight_bits": {op.path: op.weights.bits for op in graph.weighted},
            "latency_conditions": "batch 1, one thread, CPU time, the fastest of 25 turns; float"
            " and int8 take turns in one process, and the speed-up is the median of their ratios."
            " Weights of fewer than 8 bits are int8 on the device, so their latency is that of"
            " int8.",
        }
        networks = [exporter.load(model), exporter.load(twin)]
        example = _gate.examples(exporter, x[:1])[0]
        turns = _measure.latencies_us(networks, example)
        report["latency_us"], report["float_latency_us"] = turns.min(0).tolist()
        report["speed_up"] = float(np.median(turns[:, 1] / turns[:, 0]))
        report["bytes"], report["float_bytes"] = exporter.size(model), exporter.size(twin)
        report["packed_bytes"] = None if packed is None else len(packed)
        report["memory"] = {"activation_bytes": graph.activation_bytes}
        if whole is not None:
            report["factored"] = whole
        names = [*exporter.companions, exporter.file]
        if model.suffix in runner.SUFFIXES:
            for beside in (temporary, twin.parent):
                (beside / REPORT).write_text(json.dumps(report))
            stored = source.dataset.x_test[:20]
            for key, path in (("process_mb", model), ("float_process_mb", twin)):
                report["memory"][key], torch = _measure.memory_mb(path, stored, twin.parent)
            report["runs_without_torch"] = not torch
            shutil.copyfile(runner.__file__, temporary / RUNNER)
            names.insert(0, RUNNER)
        (temporary / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        names.insert(0, REPORT)
        if packed is not None:
            (temporary / (exporter.file + runner.PACKED)).write_bytes(packed)
            names.insert(0, exporter.file + runner.PACKED)
        for file in names:  # the model last: what describes it is there by then
            os.replace(temporary / file, folder / file)
    return Released(folder / exporter.file, report)


def _whole(source: Source, exporter: Exporter, folder: Path, size: int) -> dict[str, Any]:
    """Return what the file would be without factors.

    Raises:
      ConfigError: If it would not be larger than ``size`` bytes, packed if it can be.
    """
    assert source.whole is not None
    whole, metric = source.whole, source.task.metric.name
    graph = exporter.adapt(convert(whole.network, whole.dataset.input_shape))
    folder.mkdir()
    exporter.write(graph, folder / exporter.file, integer=True)
    packed = _packed(exporter, graph, folder / exporter.file)
    before = len(packed) if packed is not None else exporter.size(folder / exporter.file)
    if size >= before:
        raise ConfigError(
            f"--factorise {source.energy:g} makes the file of exporter={exporter.name} larger,"
            f" {size:,} bytes in place of {before:,}; give less than that, or leave it out"
        )
    x, y = whole.dataset.test_inputs(), whole.dataset.y_test
    return {
        "energy": source.energy,
        "bytes": size,
        "whole_bytes": before,
        "parameters": sum(op.weights.values.size for op in graph.weighted),
        f"trained_{metric}": whole.task.evaluate(whole.logits(x), x, y),
    }


def _check_grids(graph: Graph) -> None:
    for op in graph.operators:
        if op.output.grid.bits < 8:
            raise ConfigError(
                f"the activation after {op.path} has {op.output.grid.bits} bits, and no runtime"
                " clips int8 to fewer: training with such activations is a simulation; export a"
                " model with quantization.activation_bits=8 (weights may have fewer)"
            )


def _input(source: Source, graph: Graph, exporter: Exporter) -> dict[str, Any]:
    """Describe the input as data sets store it, channels last, and how it is scaled."""
    offset, divisor = source.dataset.scaling
    channels, *extents = graph.input.shape
    shape = [*extents, channels] if extents else [channels]
    return {
        "shape": shape,
        "layout": exporter.layout,
        "offset": offset.tolist(),
        "divisor": divisor.tolist(),
        **_grid(graph.input.grid),
    }


def _grid(grid: Any) -> dict[str, float | int]:
    return {"scale": grid.scale, "zero_point": grid.zero_point}


def _packed(exporter: Exporter, graph: Graph, model: Path) -> bytes | None:
    stored = exporter.stored(graph)
    if stored is None:
        return None
    content = model.read_bytes()
    layers = [op.weights for op in graph.weighted]
    packed = _packing.pack(content, list(zip(layers, stored, strict=True)))
    if packed is not None and runner.unpack(packed) != content:
        raise FedqError("packing the weights is not reversible; please report this model")
    return packed
