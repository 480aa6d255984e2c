"""OpenVINO IR (.xml and .bin), made of the ONNX model with quantize and dequantize nodes.

Going through ONNX is not a detour: OpenVINO's importer of torch programs fails on quantized ones,
and its transformations for low precision are written for this form.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from fedq.export._graph import Graph
from fedq.export.base import Exporter, Operators, require
from fedq.export.onnx import Onnx
from fedq.registry import register

#: Layers that compute; what else a compiled model holds moves or converts.
_COMPUTES = {
    "Convolution",
    "GroupConvolution",
    "FullyConnected",
    "MatMul",
    "Eltwise",
    "Pooling",
    "Reduce",
}
_INTEGERS = {"i8", "u8"}


@register("exporter", "openvino")
class OpenVino(Exporter):
    """OpenVINO IR; input and output are float32, channels first, one example."""

    file: ClassVar[str] = "model.xml"
    companions: ClassVar[tuple[str, ...]] = ("model.bin",)
    extra: ClassVar[str] = "export-openvino"
    modules: ClassVar[tuple[str, ...]] = ("openvino", "onnx")
    runtime: ClassVar[str] = "openvino"
    device: ClassVar[str] = "Intel CPUs, GPUs and NPUs in gateways (OpenVINO)"

    def write(self, graph: Graph, path: Path, *, integer: bool) -> None:
        """Write both files."""
        openvino = require("openvino", self)
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "model.onnx"
            Onnx().write(graph, onnx, integer=integer)
            model = openvino.Core().read_model(str(onnx))
            model.reshape([1, *graph.input.shape])
            openvino.save_model(model, str(path), compress_to_fp16=False)

    def operators(self, path: Path) -> Operators:
        """Count layers of the compiled model by the precision of their inputs."""
        openvino = require("openvino", self)
        compiled = openvino.Core().compile_model(str(path), "CPU")
        integer: Counter[str] = Counter()
        fallback: Counter[str] = Counter()
        for op in compiled.get_runtime_model().get_ordered_ops():
            kind = _text(op, "layerType")
            if kind in _COMPUTES:
                whole = _text(op, "runtimePrecision") in _INTEGERS
                (integer if whole else fallback)[kind] += 1
        return Operators(dict(integer), dict(fallback))


def _text(op: Any, key: str) -> str:
    info = op.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""
