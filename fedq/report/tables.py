"""Comparison tables: terminal, Markdown and CSV, one row per run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedq.report.runs import Run, equal_accuracy, labels, references

_HEADERS = {
    "run": "run",
    "codec": "codec",
    "score": "accuracy",
    "float_score": "float twin",
    "uplink": "uplink",
    "uplink_bits": "bit/param",
    "downlink": "downlink",
    "downlink_bits": "bit/param",
    "total": "total",
    "ratio": "vs float",
    "rounds": "rounds",
    "time": "time",
}
#: Terminal columns: what stands above and what stands dimmed below.
_PAIRS = (
    ("run", "codec"),
    ("score", "float_score"),
    ("uplink", "uplink_bits"),
    ("downlink", "downlink_bits"),
    ("total", "ratio"),
    ("rounds", "time"),
)


def comparison_table(runs: Sequence[Run]) -> Table:
    """Return the runs side by side, two lines each, for a terminal of 80 columns or more.

    Accuracy, or the task's own metric, is that of the deployed quantized model on the test set, its
    float twin below it.
    Sizes are bytes of all messages of the run; ``kB``, ``MB`` and ``GB`` are powers of 1000.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, leading=1)
    headers = _headers(runs)
    for above, below in _PAIRS:
        header = Text(headers[above]) + Text(f"\n{headers[below]}", "dim")
        if above == "run":
            table.add_column(header, overflow="fold", min_width=16)
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for cells in _rows(runs):
        table.add_row(
            *(Text(cells[above]) + Text(f"\n{cells[below]}", "dim") for above, below in _PAIRS)
        )
    return table


def to_markdown(runs: Sequence[Run]) -> str:
    """Return the comparison as a GitHub table, and the note below it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    align = ["---" if key in ("run", "codec") else "---:" for key in _HEADERS]
    body = [[cells[key] for key in _HEADERS] for cells in _rows(runs)]
    headers = [*_headers(runs).values()]
    return "\n".join([*map(line, [headers, align, *body]), "", note(runs), ""])


def to_csv(runs: Sequence[Run]) -> str:
    """Return the comparison as CSV: plain numbers, accuracy in [0, 1], sizes in bytes."""
    rows = records(runs)
    out = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return all that the tables know of each run, for CSV and Parquet."""
    return [
        _record(run, label, reference)
        for run, label, reference in zip(runs, labels(runs), references(runs), strict=True)
    ]


def note(runs: Sequence[Run]) -> str:
    """Return what the ratio is against, bytes at equal accuracy, time, energy and guarantees."""
    named = list(zip(runs, labels(runs), strict=True))
    beside = [f"{label}: {text}." for run, label in named if (text := physics(run))]
    beside += [
        f"{label}: {privacy(run.summary['privacy'])}"
        for run, label in named
        if "privacy" in run.summary
    ]
    floats = references(runs)
    if not any(floats):
        plain = "No float run among these: bytes are compared with the same messages as float32."
        return "\n".join([plain, *beside])
    lines = []
    for (run, label), reference in zip(named, floats, strict=True):
        if reference is None or reference is run:
            continue
        equal = equal_accuracy(run, reference)
        if equal is not None:
            lines.append(
                f"{label} reached {run.metric.text(equal.level)} with {size(equal.run_bytes)}, "
                f"float with {size(equal.float_bytes)}: {ratio(equal.ratio)}."
            )
    return "\n".join(lines + beside)


def physics(run: Run) -> str:
    """Return a run's simulated time and energy and its bytes on the wire, as far as it has them."""
    seconds, energy, wire = run.spent("simulated_seconds"), run.spent("joules"), run.wire_bytes
    parts = [
        "" if seconds is None else f"{duration(seconds)} simulated",
        "" if energy is None else f"{joules(energy)} of all devices",
        "" if wire is None else f"{size(wire)} on the wire for {size(run.total_bytes)} of messages",
    ]
    return ", ".join(part for part in parts if part)


def privacy(said: Mapping[str, Any]) -> str:
    """Return a summary's statement of privacy in one line.

    >>> said = {"epsilon": 2.5, "delta": 1e-5, "unit": "client", "mechanism": "gaussian"}
    >>> privacy({**said, "against": "the public", "caveats": ["seeded"]})
    'epsilon 2.5 at delta 1e-05 per client (gaussian), against the public; seeded.'
    """
    stated = (
        f"epsilon {said['epsilon']:.3g} at delta {said['delta']:.3g} per {said['unit']} "
        f"({said['mechanism']}), against {said['against']}"
    )
    return "; ".join([stated, *said["caveats"]]) + "."


def size(count: float) -> str:
    """Return a number of bytes with three digits and a decimal unit.

    >>> [size(n) for n in (0, 999, 1000, 2_104_000, 50_320_000, 999_900, 1.25e12)]
    ['0 B', '999 B', '1.00 kB', '2.10 MB', '50.3 MB', '1.00 MB', '1.25 TB']
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while float(f"{count:.3g}") >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{_digits(count)} {units[0]}"


def ratio(value: float) -> str:
    """Return how many times fewer bytes.

    >>> ratio(31.4), ratio(2.54), ratio(1.0), ratio(0.5)
    ('31x less', '2.5x less', 'the same', '2.0x more')
    """
    if f"{value:.2f}" == "1.00":
        return "the same"
    times, word = (value, "less") if value > 1 else (1 / value, "more")
    return f"{times:.{0 if times >= 10 else 1}f}x {word}"


def duration(seconds: float | None) -> str:
    """Return a time in its natural unit.

    >>> [duration(s) for s in (0.52, 38.4, 600, 7400)]
    ['0.5 s', '38 s', '10 min', '2.1 h']
    """
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def joules(value: float) -> str:
    """Return an energy in its natural unit.

    >>> [joules(v) for v in (0.0213, 53.2, 12_300, 4.2e6)]
    ['0.0213 J', '53.2 J', '12.3 kJ', '4.2 MJ']
    """
    for unit, scale in (("MJ", 1e6), ("kJ", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} J"


def _digits(value: float) -> str:
    return f"{value:.{max(0, 2 - len(str(int(float(f'{value:.3g}')))) + 1)}f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.{2 if value < 9.995 else 1}f}"


def _times_less(run: Run, reference: Run | None) -> float | None:
    if reference is None:
        other = run.float32_bytes
    elif run.finished and reference.finished:
        other = reference.total_bytes
    else:
        return None
    return other / run.total_bytes if other and run.total_bytes else None


def _headers(runs: Sequence[Run]) -> dict[str, str]:
    """Return the columns' headings: with the metric, if it is one for all."""
    titles = {run.metric.title for run in runs}
    return {**_HEADERS, "score": titles.pop() if len(titles) == 1 else "metric"}


def _rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the cells of each run as text, by the keys of ``_HEADERS``."""
    rows = []
    several = len({run.metric for run in runs}) > 1
    for run, label, reference in zip(runs, labels(runs), references(runs), strict=True):
        unit = f" {run.metric.title}" if several else ""
        less = _times_less(run, reference)
        rows.append(
            {
                "run": label if run.finished else f"{label} (unfinished)",
                "codec": run.codec,
                "score": run.metric.text(run.score) + unit,
                "float_score": run.metric.text(run.float_score),
                "uplink": size(run.uplink_bytes),
                "uplink_bits": _rate(run.uplink_bits),
                "downlink": size(run.downlink_bytes),
                "downlink_bits": _rate(run.downlink_bits),
                "total": size(run.total_bytes),
                "ratio": "reference" if reference is run else "-" if less is None else ratio(less),
                "rounds": f"{run.done}" if run.finished else f"{run.done} of {run.planned}",
                "time": duration(run.seconds),
            }
        )
    return rows


def _record(run: Run, label: str, reference: Run | None) -> dict[str, Any]:
    equal = None if reference is None else equal_accuracy(run, reference)
    return {
        "run": label,
        "path": run.path.as_posix(),
        "codec": run.codec,
        run.metric.name: run.score,
        run.metric.float_name: run.float_score,
        "uplink_bytes": run.uplink_bytes,
        "downlink_bytes": run.downlink_bytes,
        "total_bytes": run.total_bytes,
        "wire_bytes": run.wire_bytes,
        "float32_bytes": run.float32_bytes,
        "uplink_bits_per_parameter": run.uplink_bits,
        "downlink_bits_per_parameter": run.downlink_bits,
        "times_fewer_bytes": _times_less(run, reference),
        f"equal_{run.metric.name}": equal and equal.level,
        f"times_fewer_bytes_at_equal_{run.metric.name}": equal and equal.ratio,
        "rounds": run.done,
        "planned_rounds": run.planned,
        "finished": str(run.finished).lower(),
        "seconds": run.seconds,
        "simulated_seconds": run.spent("simulated_seconds"),
        "joules": run.spent("joules"),
        "seed": run.summary.get("seed", run.config.get("seed")),
        "model_sha256": run.summary.get("model_sha256"),
    }
