"""Tables of exported models: what the float twin costs in the same runtime stands beside."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.table import Table
from rich.text import Text

from fedq.metrics import ACCURACY, Metric, metric_of


class Released(Protocol):
    """An exported model and its report, as :mod:`fedq.export` gives it."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def report(self) -> dict[str, Any]:
        """The content of ``export.json``."""


_COLUMNS = (
    ("runtime", "device"),
    ("metric", "float twin"),
    ("latency", "float"),
    ("size", "float"),
    ("agreement", "steps"),
    ("int ops", "float ops"),
)


def table(released: Iterable[Released]) -> Table:
    """Return exports side by side, two lines each: the int8 model above, its float twin below.

    Accuracy (or the task's metric) and latency are those of the runtime itself; agreement is the
    share of test examples with the same class as the trained network (without classes, of outputs
    within a step), and ``steps`` the largest difference of an output in steps of its grid.
    """
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, leading=1)
    released = list(released)
    titles = {_metric(item.report).title for item in released}
    for i, (above, below) in enumerate(_COLUMNS):
        if above == "metric" and len(titles) == 1:
            (above,) = titles
        header = Text(above) + Text(f"\n{below}", "dim")
        if i:
            result.add_column(header, justify="right", no_wrap=True)
        else:
            result.add_column(header, overflow="fold", min_width=20)
    for item in released:
        cells = _cells(item.report)
        result.add_row(*(Text(above) + Text(f"\n{below}", "dim") for above, below in cells))
    return result


def _cells(report: dict[str, Any]) -> list[tuple[str, str]]:
    parity = report["parity"]
    packed, metric = report["packed_bytes"], _metric(report)
    size = _kilobytes(report["bytes"])
    if packed is not None:
        size += f" ({_kilobytes(packed)} packed)"
    count = [sum(parity[f"{kind}_operators"].values()) for kind in ("integer", "float")]
    return [
        (report["exporter"], report["device"]),
        tuple(_digits(metric, report[name]) for name in (metric.name, metric.float_name)),
        (f"{report['latency_us']:.1f} us", f"{report['float_latency_us']:.1f} us"),
        (size, _kilobytes(report["float_bytes"])),
        (f"{100 * parity['agreement']:.2f} %", str(parity["largest_difference_steps"])),
        (str(count[0]), str(count[1])),
    ]


def factored(report: dict[str, Any]) -> str | None:
    """Return what factors changed of a file, None if there are none."""
    if "factored" not in report:
        return None
    whole, metric = report["factored"], _metric(report)
    name = f"trained_{metric.name}"
    return (
        f"{report['exporter']}: factors keep {100 * whole['energy']:g} % of each weight's energy:"
        f" {_kilobytes(whole['whole_bytes'])} became {_kilobytes(whole['bytes'])},"
        f" {metric.title} {_digits(metric, whole[name])} became {_digits(metric, report[name])}"
    )


def _metric(report: dict[str, Any]) -> Metric:
    return metric_of(report) or ACCURACY


def _digits(metric: Metric, value: float) -> str:
    """Return a value with one digit more than other tables have: the twins are close."""
    return f"{100 * value:.2f} %" if metric.percent else f"{value:.5g}"


def _kilobytes(count: int) -> str:
    return f"{count / 1000:.1f} kB"


def to_json(released: Iterable[Released]) -> str:
    """Return the reports as a JSON list, each with its path."""
    return json.dumps([{"path": str(item.path), **item.report} for item in released], indent=1)
