"""A C array for TensorFlow Lite Micro: the .tflite of LiteRT as a source file to compile in.

The gate reads the array back from the source, and executes it in TFLite Micro's own interpreter,
which refuses operators that it has no kernel for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import FedqError
from fedq.export import _graph, runner
from fedq.export._graph import Graph
from fedq.export.base import Exporter, Operators, require
from fedq.export.litert import Litert, count
from fedq.registry import register

_HEADER = """\
// A model for TensorFlow Lite Micro, written by fedq: tflite::GetModel(fedq_model).
// Input: int8 {shape}, real = {input_scale!r} * (integer - {input_zero}).
// Output: int8 [1, {classes}], real = {output_scale!r} * (integer - {output_zero}).
// Operators for the resolver: {operators}.
// Arena: at least {arena} bytes for values, besides the interpreter's own structures.
#include <cstdint>

extern "C" const unsigned int fedq_model_length = {length};
extern "C" alignas(16) const unsigned char fedq_model[{length}] = {{
"""


@register("exporter", "c")
class C(Exporter):
    """A C++ source file with the model as an array, for TensorFlow Lite Micro."""

    file: ClassVar[str] = "model.cc"
    extra: ClassVar[str] = "export-c"
    modules: ClassVar[tuple[str, ...]] = (*Litert.modules, "tflite_micro")
    runtime: ClassVar[str] = "tflite-micro"
    device: ClassVar[str] = "microcontrollers (TensorFlow Lite Micro, CMSIS-NN, ESP-NN)"
    layout: ClassVar[str] = "channels_last"

    def write(self, graph: Graph, path: Path, *, integer: bool) -> None:
        """Write the source file."""
        if integer:  # TFLite Micro's averages round more coarsely
            graph = _graph.convolve_averages(graph, every=True)
        content = Litert().content(graph, integer=integer)
        operators = count(require("ai_edge_litert.schema_py_generated", self), content)
        rows = [content[i : i + 16] for i in range(0, len(content), 16)]
        body = "".join(
            "    " + "".join(f"0x{byte:02x}, " for byte in row)[:-1] + "\n" for row in rows
        )
        source, result = graph.input, graph.output
        shape = (
            [1, *source.shape[1:], source.shape[0]] if len(source.shape) > 1 else [1, *source.shape]
        )
        path.write_text(
            _HEADER.format(
                shape=shape,
                input_scale=source.grid.scale,
                input_zero=source.grid.zero_point,
                classes=result.shape[0],
                output_scale=result.grid.scale,
                output_zero=result.grid.zero_point,
                operators=", ".join(sorted({*operators.integer, *operators.fallback})),
                arena=graph.activation_bytes,
                length=len(content),
            )
            + body
            + "};\n"
        )

    def operators(self, path: Path) -> Operators:
        """Count the operators of the array."""
        schema = require("ai_edge_litert.schema_py_generated", self)
        return count(schema, _array(path))

    def size(self, path: Path) -> int:
        """Return the length of the array: what it takes of the flash memory."""
        return len(_array(path))

    def load(self, path: Path) -> runner.Network:
        """Return the array as TFLite Micro computes it."""
        micro = require("tflite_micro", self).runtime
        content = _array(path)
        try:
            interpreter = micro.Interpreter.from_bytes(
                content, arena_size=16 * len(content) + 2**22
            )
        except Exception as error:
            raise FedqError(f"TFLite Micro cannot run the model: {error}") from error
        source, result = interpreter.get_input_details(0), interpreter.get_output_details(0)

        def put(x: NDArray[Any]) -> None:
            integers = runner.to_integers(x, *_grid(source), dtype=source["dtype"])
            interpreter.set_input(integers.reshape(source["shape"]), 0)

        def get() -> NDArray[Any]:
            return runner.to_reals(interpreter.get_output(0), *_grid(result))

        return runner.Network(put, interpreter.invoke, get)


def _grid(tensor: dict[str, Any]) -> tuple[float, int]:
    parameters = tensor["quantization_parameters"]
    if not len(parameters["scales"]):
        return 0.0, 0
    return float(parameters["scales"][0]), int(parameters["zero_points"][0])


def _array(path: Path) -> bytes:
    """Return the bytes of the array in a source file."""
    body = path.read_text().split("= {\n", 1)[1]
    return np.array(
        [int(text, 16) for text in re.findall(r"0x[0-9a-f]{2}", body)], np.uint8
    ).tobytes()
