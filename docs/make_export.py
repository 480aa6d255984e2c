"""What is made for docs/export.md: parity and gains, from the results of benchmarks/export.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import _make
from _make import DOCS, REPOSITORY

from fedq.metrics import METRICS

PAGE = DOCS / "export.md"
RESULTS = REPOSITORY / "benchmarks" / "results" / "export.json"
#: Columns of both tables by the exporter's name.
PARITY = {
    "integers": "integers",
    "litert": "LiteRT",
    "onnx": "ONNX Runtime",
    "c": "TFLite Micro",
    "tensorrt": "TensorRT's file",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
}
GAINS = ("litert", "onnx", "openvino", "executorch")

Cell = Mapping[str, Any]
Cells = dict[tuple[str, int], dict[str, Cell]]


def cells() -> dict[str, Cells]:
    """Return the results: by processor, then by model and bits, then by runtime."""
    found: dict[str, Cells] = {}
    for cell in json.loads(RESULTS.read_text())["cells"]:
        if "energy" not in cell:
            own = found.setdefault(cell["cpu"], {})
            own.setdefault((cell["model"], cell["bits"]), {})[cell["runtime"]] = cell
    return found


def parity(found: Cells) -> str:
    """Return the table of agreement and steps."""
    rows = []
    for (model, bits), by in found.items():
        metric = next(m for m in METRICS if m.name == by["integers"]["metric"])
        trained = by["integers"]["trained_score"]
        score = f"{100 * trained:.1f} %" if metric.percent else f"{trained:.4g}"
        compared = [_compared(by.get(name)) for name in PARITY]
        rows.append([f"`{model}`", str(bits), f"{metric.title} {score}", *compared])
    return _make.table(["model", "bits", "as trained", *PARITY.values()], rows, right=3)


def _compared(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if "agreement" not in cell:
        return "refused"
    text = f"{100 * cell['agreement']:.2f}".rstrip("0").rstrip(".") + f" %, {cell['steps']}"
    return f"**{text}**" if "refused" in cell else text


def gains(found: Cells) -> str:
    """Return the table of latencies and sizes of 8 bits beside float."""
    rows = []
    for (model, bits), by in found.items():
        if bits == 8 and "litert" in by:
            litert = by["litert"]
            size = f"{_digits(litert['float_bytes'] / 1000)} → {_digits(litert['bytes'] / 1000)}"
            narrower = (found.get((model, less), {}).get("litert", {}) for less in (4, 2))
            narrow = [cell.get("packed_bytes") for cell in narrower]
            packed = " / ".join(_digits(count / 1000) if count else "-" for count in narrow)
            rows.append([f"`{model}`", *(_gain(by.get(name)) for name in GAINS), size, packed])
    heads = [f"{PARITY[name]}, µs" for name in GAINS]
    return _make.table(
        ["model", *heads, "LiteRT file, kB", "packed: 4 / 2 bits, kB"], rows, right=1
    )


def _gain(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if "refused" in cell:
        return "refused"
    before, after = (_digits(cell[key]) for key in ("float_latency_us", "latency_us"))
    return f"{before} → {after} ({cell['speed_up']:.1f}x)"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size_and_date(found: Cells) -> tuple[int, str]:
    return len(found), min(cell["date"] for own in found.values() for cell in own.values())


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the page with the tables of the results file."""
    found = cells()
    whole = max(found.values(), key=_size_and_date)  # where the whole zoo was measured anew, last
    tables = [f"{cpu}:\n\n{gains(own)}" for cpu, own in found.items()]
    page = _make.with_made(PAGE.read_text(), "parity", parity(whole))
    yield PAGE, _make.with_made(page, "gains", "\n\n".join(tables))
