"""Run an exported model on a device: NumPy and the runtime, nothing else. Copy this file as it is.

::

    python runner.py model.tflite --data test.npz

It needs no torch and nothing of fedq (a ``.pte`` excepted: the Python binding of ExecuTorch brings
torch along). ``export.json`` beside the model says how to scale and lay out the inputs. Packed
models (``.packed``) are unpacked in memory.

=========  ==============================  =========================================
file       runtime                         install
=========  ==============================  =========================================
.tflite    LiteRT                          ``ai-edge-litert`` (or ``tflite-runtime``)
.onnx      ONNX Runtime                    ``onnxruntime``
.xml       OpenVINO                        ``openvino``
.pte       ExecuTorch                      ``executorch``
=========  ==============================  =========================================
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PACKED, MAGIC = ".packed", b"fqpk\x01"
SUFFIXES = ".tflite", ".onnx", ".xml", ".pte"
METRICS = {"classification": "accuracy", "regression": "mae", "reconstruction": "auc"}


class RunnerError(Exception):
    """What went wrong, in one line that says what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Answer for the examples of an NPZ file; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.npz",
        help="examples as x_test or x, stored as for training, and their truths as y_test or y",
    )
    parser.add_argument("--limit", type=int, help="the first N examples alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="machine-readable, with every class")
    options = parser.parse_args(arguments)
    try:
        result = classify(options.model, options.data, options.limit, options.threads)
    except RunnerError as error:
        print(f"runner: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"examples   {result['examples']}")
    name = METRICS[result["task"]]
    score = result[name]
    shown = f"{100 * score:.2f} %" if name == "accuracy" and score is not None else score
    print(f"{name:<10} {'unknown: no truths' if score is None else shown}")
    print(f"latency    {result['latency_us']:.1f} us (median)")
    print(f"memory     {result['memory_mb']:.1f} MB more than before loading")
    return 0


def classify(model: Path, data: Path, limit: int | None = None, threads: int = 1) -> dict[str, Any]:
    """Return the answers to an NPZ file's examples, how good they are, latency and memory.

    Answers are ``classes``, or ``values`` of a regression in the units of training, or ``errors``
    of a reconstruction: the larger, the more anomalous.

    Args:
      model: The exported file, ``export.json`` beside it.
      data: Holds ``x_test`` or ``x`` as stored for training (channels last), and perhaps labels.
      limit: The first examples alone.
      threads: Of the runtime.

    Raises:
      RunnerError: If a file is missing or damaged, or the runtime is not installed.
    """
    x, y, labels = _read_data(data, limit)
    about = describe(model)
    task = about.pop("task")
    x = scaled(x, about)
    before = _peak_mb()
    network = load(model, threads)
    outputs, times = [], []
    for example in x:
        network.put(example[None])
        start = time.perf_counter()
        network.invoke()
        times.append(time.perf_counter() - start)
        outputs.append(network.get()[0].copy())
    return {
        "examples": len(x),
        "task": task["name"],
        **judged(task, np.stack(outputs), x, y, labels),
        "latency_us": 1e6 * float(np.median(times)),
        "memory_mb": _peak_mb() - before,
        "torch": sys.modules.get("torch") is not None,
    }


def judged(
    task: dict[str, Any], outputs: Array, x: Array, y: Array | None, labels: Array | None
) -> dict[str, Any]:
    """Return what outputs say, and the task's metric if the truth is known."""
    if task["name"] == "regression":
        values = outputs * task["divisor"] + task["offset"]
        mae = None if y is None else float(np.abs(values - y.reshape(values.shape)).mean())
        return {"values": values.tolist(), "mae": mae}
    if task["name"] == "reconstruction":
        errors = np.square(outputs - x.reshape(outputs.shape)).mean(1)
        auc = None
        if y is not None:
            anomalous = (y if y.ndim == 1 else y[:, 0]).astype(bool)
            gaps = errors[anomalous][:, None] - errors[~anomalous]
            auc = float((gaps > 0).mean() + (gaps == 0).mean() / 2) if gaps.size else None
        return {"errors": errors.tolist(), "auc": auc}
    chosen = outputs.argmax(1)
    classes = chosen if labels is None else labels[chosen]
    return {
        "classes": classes.tolist(),
        "accuracy": None if y is None else float((classes == y).mean()),
    }


def _peak_mb() -> float:
    """Return the most memory that this process ever had resident."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- inputs --------------------------------------------------------------------------------------


def describe(model: Path) -> dict[str, Any]:
    """Return what ``export.json`` beside a model says of its input, and its task."""
    path = model.parent / "export.json"
    try:
        found = json.loads(path.read_text())
        about = found["input"]
        task = found.get("task", {"name": "classification"})
        assert isinstance(about["shape"], list)
        assert task["name"] in METRICS
    except FileNotFoundError:
        raise RunnerError(f"{path} is missing; copy it from the export, too") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise RunnerError(f"{path} is damaged; copy it from the export again") from None
    return {**about, "task": task}


def scaled(x: Array, about: dict[str, Any]) -> Array:
    """Return stored examples as the runtime takes them: scaled, in its order of axes."""
    offset, divisor = (np.asarray(about[key], np.float64) for key in ("offset", "divisor"))
    x = ((x - offset) / divisor).astype(np.float32)
    shape = tuple(about["shape"])
    if x.shape[1:] != shape and x.shape[1:] == shape[:-1] and shape[-1] == 1:
        x = x[..., None]  # grey images may be stored without their one channel
    if x.shape[1:] != shape:
        raise RunnerError(f"examples have shape {x.shape[1:]}, but the model takes {shape}")
    if about["layout"] == "channels_first" and x.ndim > 2:
        x = np.moveaxis(x, -1, 1)
    return np.ascontiguousarray(x)


def _read_data(path: Path, limit: int | None) -> tuple[Array, Array | None, Array | None]:
    """Return examples, their labels if any, and the classes' names if they are there."""
    names = "x_test", "x", "y_test", "y", "y_train"
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            held = {name: file[name] for name in names if name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunnerError(f"cannot read {path}: {error}") from None
    x = held.get("x_test", held.get("x"))
    y = held.get("y_test" if "x_test" in held else "y")
    if x is None or x.ndim == 0 or not len(x[:limit]):
        raise RunnerError(f"{path} holds no examples named x_test or x")
    if y is not None and y.shape[:1] != x.shape[:1]:
        raise RunnerError(f"{path} holds {len(x)} examples, but labels of shape {y.shape}")
    labels = np.unique(held["y_train"]) if "y_train" in held else None  # of a classification
    return x[:limit], None if y is None else y[:limit], labels


# --- runtimes ------------------------------------------------------------------------------------


class Network:
    """A loaded model: takes one example, (1, *shape) float32, and gives its logits as floats.

    Args:
      put: Hands the runtime its input.
      invoke: Computes; what a latency is of.
      get: Returns the logits.
    """

    def __init__(
        self, put: Callable[[Array], None], invoke: Callable[[], object], get: Callable[[], Array]
    ) -> None:
        self.put, self.invoke, self.get = put, invoke, get

    def __call__(self, x: Array) -> Array:
        """Classify."""
        self.put(x)
        self.invoke()
        return self.get()


def load(model: Path, threads: int = 1) -> Network:
    """Return a model ready to run.

    Raises:
      RunnerError: If the file is missing, damaged, of no known kind, or its runtime not installed.
    """
    name = model.name.removesuffix(PACKED)
    loaders = dict(zip(SUFFIXES, (_litert, _onnx, _openvino, _executorch), strict=True))
    loader = loaders.get(Path(name).suffix)
    if loader is None:
        raise RunnerError(f"{model} is none of {', '.join(SUFFIXES)}")
    if not model.is_file():
        raise RunnerError(f"there is no file {model}")
    try:
        return loader(model, threads)
    except RunnerError:
        raise
    except Exception as error:  # every runtime has errors of its own
        raise RunnerError(f"cannot load {model}: {' '.join(str(error).split())}") from error


def _content(model: Path) -> bytes:
    data = model.read_bytes()
    return unpack(data) if model.suffix == PACKED else data


def _require(*modules: str, install: str) -> Any:
    for name in modules:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise RunnerError(f"{install} is not installed; pip install {install}")


def _litert(model: Path, threads: int) -> Network:
    names = "ai_edge_litert.interpreter", "tflite_runtime.interpreter"
    interpreter = _require(*names, install="ai-edge-litert").Interpreter
    return tflite(interpreter(model_content=_content(model), num_threads=threads))


def tflite(interpreter: Any) -> Network:
    """Return the network of a TFLite interpreter; integer inputs and outputs are converted."""
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    scale, zero_point = source["quantization"]

    def put(x: Array) -> None:
        x = to_integers(x, scale, zero_point, source["dtype"])
        interpreter.set_tensor(source["index"], x.reshape(source["shape"]))

    def get() -> Array:
        return to_reals(interpreter.get_tensor(result["index"]), *result["quantization"])

    return Network(put, interpreter.invoke, get)


def to_integers(x: Array, scale: float, zero_point: int, dtype: Any = np.int8) -> Array:
    """Return floats on an integer grid; a scale of 0 leaves them as they are."""
    if not scale:
        return x
    limits = np.iinfo(dtype)
    steps = np.rint(x / np.float32(scale)) + zero_point
    integers: Array = steps.clip(limits.min, limits.max).astype(dtype)
    return integers


def to_reals(y: Array, scale: float, zero_point: int) -> Array:
    """Return the reals that integers stand for; a scale of 0 leaves them as they are."""
    reals: Array = np.float32(scale) * (y.astype(np.float32) - zero_point) if scale else y
    return reals


def _onnx(model: Path, threads: int) -> Network:
    onnxruntime = _require("onnxruntime", install="onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Without VNNI, sums of u8 x s8 products saturate at 16 bits, silently; this keeps them exact.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(
        _content(model), options, providers=["CPUExecutionProvider"]
    )
    inputs: dict[str, Array] = {}
    logits: list[Array] = []
    name = session.get_inputs()[0].name

    def put(x: Array) -> None:
        inputs[name] = x

    def invoke() -> None:
        logits[:] = session.run(None, inputs)

    return Network(put, invoke, lambda: logits[0])


def _openvino(model: Path, threads: int) -> Network:
    openvino = _require("openvino", install="openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # no bfloat16 behind our back
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(str(model), "CPU", settings)
    request = compiled.create_infer_request()
    return Network(
        lambda x: request.set_input_tensor(openvino.Tensor(x)),
        request.infer,
        lambda: np.array(request.get_output_tensor().data),
    )


def _executorch(model: Path, threads: int) -> Network:
    content = _content(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its binding calls itself experimental
        runtime = _require("executorch.runtime", install="executorch")
        program = runtime.Runtime.get().load_program(content)
        method = program.load_method("forward")
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    kept = content, program  # the method points into them, and does not keep them alive
    inputs: list[Any] = []
    logits: list[Any] = []

    def put(x: Array) -> None:
        inputs[:] = [torch.from_numpy(x)]

    def invoke() -> None:
        assert kept
        logits[:] = method.execute(inputs)

    return Network(put, invoke, lambda: logits[0].numpy())


# --- packed weights ------------------------------------------------------------------------------


def unpack(data: bytes) -> bytes:
    """Return the file whose weights of few bits were packed by ``fedq export``.

    Body, little-endian: magic and version (5 bytes), CRC-32 of what follows (4), regions (4), then
    per region its offset (4), its count of int8 weights (4), their bits (1) and what each level is
    multiplied by (1); the regions' levels in two's complement, each region padded to a byte; the
    file without the regions.

    Raises:
      RunnerError: If the file is damaged; sizes are checked before memory is spent.
    """
    damaged = RunnerError("the packed model is damaged; copy it again")
    if data[:5] != MAGIC or len(data) < 13 or zlib.crc32(data[9:]) != _number(data, 5):
        raise damaged
    regions, at = [], 13
    for _ in range(_number(data, 9)):
        if len(data) < at + 10:
            raise damaged
        regions.append((_number(data, at), _number(data, at + 4), data[at + 8], data[at + 9]))
        at += 10
    out = bytearray()
    rest = at + sum((count * bits + 7) // 8 for _, count, bits, _ in regions)
    if rest > len(data):
        raise damaged
    for offset, count, bits, spread in regions:
        size = (count * bits + 7) // 8
        fill = offset - len(out)
        if fill < 0 or rest + fill > len(data) or not 2 <= bits <= 8:
            raise damaged
        out += data[rest : rest + fill]
        rest += fill
        levels = np.unpackbits(np.frombuffer(data, np.uint8, size, at), count=count * bits)
        weight = (1 << np.arange(bits))[::-1].astype(np.int16)
        values = levels.reshape(count, bits) @ weight
        values = np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
        out += (values * spread).astype(np.int8).tobytes()
        at += size
    out += data[rest:]
    return bytes(out)


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


if __name__ == "__main__":
    sys.exit(main())
