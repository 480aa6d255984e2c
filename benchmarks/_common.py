"""What all benchmarks share: options, CPU clocks of process trees, and results files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedq.report.study import paired

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("fedq", "flwr", "torch", "numpy", "numba", "ray", "pfl", "byzfl"),
    *("foolbox", "adversarial-robustness-toolbox", "pyautoattack"),
    *("onnxruntime", "ai-edge-litert", "tflite-micro", "openvino", "executorch"),
)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="seconds: does it run at all")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--out", type=Path, default=RESULTS, help="directory of NAME.json and NAME.md"
    )
    return options


def kept(work: Path | None, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured, now or before a kill: ``work`` keeps a file for each name.

    >>> kept(None, "row", lambda: {"seconds": 1.0})
    {'seconds': 1.0}
    """
    if work is None:
        return measure()
    file = _kept_file(work, name)
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    found = measure()
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return found


def is_kept(work: Path | None, name: str) -> bool:
    """Whether :func:`kept` would measure nothing."""
    return work is not None and _kept_file(work, name).exists()


def _kept_file(work: Path, name: str) -> Path:
    return work / f"{name.replace(' ', '_')}.json"


# --- clocks ------------------------------------------------------------------------------------


def process_tree(root: int) -> list[int]:
    """Return a process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def cpu_seconds(process: int) -> float:
    """Return the CPU time of all threads of a process, living and ended, to the nanosecond.

    Linux gives every process a clock whose number is made from its identifier; ``/proc`` counts in
    ticks of 10 ms.
    """
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return 0.0


def tree_cpu_seconds(root: int) -> dict[int, float]:
    """Return the CPU time of each process of a tree; idle zombies and the dead are left out."""
    return {process: cpu_seconds(process) for process in process_tree(root)}


def peak_resident_mb(process: int | str = "self") -> float:
    """Return the peak resident memory of a process in MB of 10**6 bytes (``VmHWM``)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6


# --- results -----------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Return the machine and the versions that figures depend on; no names and no paths."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = re.findall(r"model name\s*: (.*)", cpuinfo) or [platform.machine()]
    memory = re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cpu": models[0],
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(int(memory[0]) * 1024 / 1e9, 1),
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {"python": platform.python_version(), **installed},
    }


def when_and_where() -> dict[str, str]:
    """Return the date and the processor, for one cell of a file that several runs write."""
    here = environment()
    return {"date": here["date"], "cpu": here["machine"]["cpu"]}


def earlier_cells(
    out: Path, name: str, settings: Mapping[str, str], key: str
) -> list[dict[str, Any]]:
    """Return the cells that a results file holds of the same settings, so that a rerun goes on.

    Args:
      out: The directory.
      name: The benchmark.
      settings: Of each value of ``key``.
      key: What the settings belong to, in a cell.
    """
    path = out / f"{name}.json"
    cells = json.loads(path.read_text()).get("cells", []) if path.exists() else []
    return [cell for cell in cells if cell["settings"] == settings.get(cell[key])]


def versus(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> str | None:
    """Return the mean of differences paired by seed, with its interval; None if no seed is in both.

    >>> versus({0: 3.0, 1: 5.0}, {0: 1.0, 2: 4.0})
    '+2.00'
    """
    found = paired(ours, theirs)
    if found is None:
        return None
    mean, half = found.difference.mean, found.difference.half
    return f"{mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")


def table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a Markdown table; ``columns`` maps keys of the rows to headings.

    >>> print(table({"a": "A", "b": "B"}, [{"a": "x", "b": 1.5}, {"a": "y", "b": None}]))
    | A | B |
    |---|---:|
    | x | 1.5 |
    | y |  |
    """
    first, *others = columns
    lines = [f"| {' | '.join(columns.values())} |", f"|---|{'---:|' * len(others)}"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in (first, *others))} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(
    out: Path, name: str, title: str, text: Sequence[str], figures: Mapping[str, Any]
) -> None:
    """Write ``NAME.json`` and ``NAME.md`` and print the latter.

    Args:
      out: The directory.
      name: The benchmark.
      title: First line of the page.
      text: Paragraphs and tables.
      figures: All that was measured, JSON-ready.
    """
    where = environment()
    machine, versions = where["machine"], where["versions"]
    load = ", ".join(map(str, machine["load_average"]))
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    foot = (
        f"{where['date']}; {machine['cpu']}, {cores}, {machine['memory_gb']} GB; "
        f"load average at the end {load}; "
        + ", ".join(f"{package} {version}" for package, version in versions.items())
        + f". Made by `python benchmarks/{name}.py`; figures in `{name}.json`."
    )
    out.mkdir(parents=True, exist_ok=True)
    page = "\n\n".join([f"# {title}", *text, foot]) + "\n"
    (out / f"{name}.json").write_text(json.dumps({**where, **figures}, indent=1) + "\n")
    (out / f"{name}.md").write_text(page)
    print(page)
