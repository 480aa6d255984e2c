"""A study as tables: terminal, Markdown, CSV, LaTeX and Parquet, one row per method."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedq.errors import FedqError
from fedq.metrics import Metric
from fedq.report.runs import COSTS, EQUAL_PART
from fedq.report.study import Interval, Method, Paired, Study
from fedq.report.tables import duration, joules, ratio, size

#: Columns of the tables to read; those without any value are left out, and ``score`` is named by
#: the task's metric.
HEADERS = {
    "method": "method",
    "seeds": "seeds",
    "score": "accuracy",
    "difference": "against reference",
    "uplink": "uplink",
    "downlink": "downlink",
    "total": "total",
    "wire": "on the wire",
    "reach": f"to {100 * EQUAL_PART:.0f} % of float",
    "uplink_reach": "uplink to there",
    "less": "vs float there",
    "time": "simulated",
    "energy": "energy",
    "stored": "weights stored",
    "zeros": "zeros",
}


#: Columns on a terminal: what stands above, and what stands dimmed below.
_PAIRS = (
    ("method", "seeds"),
    ("score", "short"),
    ("uplink", "downlink"),
    ("total", "reach"),
    ("less", "time"),
    ("wire", "energy"),
)


def table(study: Study) -> Group:
    """Return a table per task for a terminal of 80 columns or more, two lines a method."""
    parts: list[Any] = []
    for task, methods in study.tasks.items():
        rows = [
            cells(study, method)
            | {"short": _difference(study.against(method), method.metric, short=True)}
            for method in methods
        ]
        headers = used(study, task, rows) | {"short": "difference", "less": "vs float"}
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, leading=1)
        pairs = [pair for pair in _PAIRS if pair[0] in headers]
        for above, below in pairs:
            header = Text(headers[above]) + Text(f"\n{headers.get(below, '')}", "dim")
            if above == "method":
                shown.add_column(header, overflow="fold", min_width=16)
            else:
                shown.add_column(header, justify="right", no_wrap=True)
        for row in rows:
            row["seeds"] = _seeds(int(row["seeds"]))
            shown.add_row(
                *(Text(row[above]) + Text(f"\n{row[below]}", "dim") for above, below in pairs)
            )
        title = [Text(task, "bold"), Text()] if len(study.tasks) > 1 else []
        parts += [*title, shown, Text()]
    return Group(*parts, *(Text(line) for line in notes(study)))


def notes(study: Study) -> list[str]:
    """Return what the figures are."""
    seeds = max(len(method.finished) for method in study.methods)
    lines = []
    if seeds > 1:
        lines.append(
            "Mean and 95 % interval over seeds (Student's t); p is of the two-sided t test of the "
            "differences paired by seed, not corrected for the number of methods."
        )
    references = dict.fromkeys(m.label for m in study.methods if m.is_reference)
    if references:
        lines.append(f"Reference: {', '.join(references)}.")
    metrics = {task: study.metric(task) for task in study.tasks}
    names = " or ".join(dict.fromkeys(metric.title for metric in metrics.values()))
    lines.append(
        f"* is on the Pareto front of {names} against bytes of both directions. Sizes are payload "
        "bytes of all messages and rounds; those on the wire are with headers and repetitions."
    )
    lines += [
        f"Lower {metric.title} is better, and {100 * EQUAL_PART:.0f} % of float is float's "
        f"{metric.title} over {EQUAL_PART:g}."
        for metric in dict.fromkeys(metrics.values())
        if not metric.higher_is_better
    ]
    return lines


def to_markdown(study: Study) -> str:
    """Return GitHub tables, one per task, and the notes."""
    parts = []
    for task, methods in study.tasks.items():
        rows = [cells(study, method) for method in methods]
        headers = used(study, task, rows)
        body = [[row[key].replace("|", "\\|") for key in headers] for row in rows]
        align = ["---" if key == "method" else "---:" for key in headers]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in [[*headers.values()], align, *body])
        parts.append(f"## {task}\n\n{lines}" if len(study.tasks) > 1 else lines)
    return "\n\n".join([*parts, *notes(study)]) + "\n"


def to_latex(study: Study) -> str:
    r"""Return a ``tabular`` per task; it needs ``\usepackage{booktabs}``."""
    parts = []
    for task, methods in study.tasks.items():
        rows = [cells(study, method) for method in methods]
        headers = used(study, task, rows)
        head = " & ".join(_escape(header) for header in headers.values())
        body = [" & ".join(_escape(row[key]) for key in headers) + r" \\" for row in rows]
        parts.append(
            "\n".join(
                [
                    f"% {task}",
                    rf"\begin{{tabular}}{{l{'r' * (len(headers) - 1)}}}",
                    r"\toprule",
                    rf"{head} \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    return "\n\n".join([*parts, *(f"% {note}" for note in notes(study))]) + "\n"


def to_csv(study: Study) -> str:
    """Return one line per method: plain numbers, scores (accuracy in [0, 1]), bytes, s, J."""
    records = [record(study, method) for method in study.methods]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> str | None:
    """Write rows as Parquet; return what to do if pyarrow is missing."""
    if find_spec("pyarrow") is None:
        return f"{path.name} needs pyarrow: pip install -e '.[study]'"
    import pyarrow
    from pyarrow import parquet

    try:
        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    except OSError as error:
        raise FedqError(f"cannot write {path}: {error}; name another folder with --out") from error
    return None


def record(study: Study, method: Method) -> dict[str, Any]:
    """Return all that is known of a method, for CSV, Parquet and the page."""
    row: dict[str, Any] = {
        "task": method.task,
        "method": method.label,
        "seeds": len(method.finished),
        "metric": method.metric.name,
        "is_reference": method.is_reference,
    }
    for figure in _FIGURES:
        mean = method.mean(figure)
        row[figure] = mean and mean.mean
        row[f"{figure}_half"] = mean and mean.half
    found = study.against(method)
    row["score_difference"] = found and found.difference.mean
    row["score_difference_half"] = found and found.difference.half
    row["p"] = found and found.p
    row["pairs"] = found and found.difference.n
    for cost in COSTS:
        reached = study.to_reach(method, cost)
        row[f"{cost}_to_float"] = reached.spent and reached.spent.mean
        row[f"{cost}_to_float_ratio"] = reached.ratio
        row[f"on_front_of_{cost}"] = study.on_front(method, cost)
        row["reached_float"], row["compared_with_float"] = reached.reached, reached.of
    return row


_FIGURES = (
    *("score", "float_score", *COSTS, "uplink_bits", "downlink_bits", "seconds"),
    *("weight_bytes", "zero_weights"),
)
#: Below this share, zeros are those that rounding leaves.
_FEW_ZEROS = 0.1


#: Which figure of :func:`record` a column is sorted by.
SORTED_BY = {
    "method": "method",
    "seeds": "seeds",
    "score": "score",
    "difference": "score_difference",
    "uplink": "uplink_bytes",
    "downlink": "downlink_bytes",
    "total": "total_bytes",
    "wire": "wire_bytes",
    "reach": "total_bytes_to_float",
    "uplink_reach": "uplink_bytes_to_float",
    "less": "total_bytes_to_float_ratio",
    "time": "simulated_seconds",
    "energy": "joules",
    "stored": "weight_bytes",
    "zeros": "zero_weights",
}


def cells(study: Study, method: Method) -> dict[str, str]:
    """Return a method's row as text, by the keys of ``HEADERS``."""
    reached = study.to_reach(method)
    on_front = study.on_front(method, "total_bytes")
    begun = not any(run.finished for run in method.runs)
    zeros = method.mean("zero_weights")
    return {
        "method": f"{method.label}{' *' if on_front else ''}{' (unfinished)' if begun else ''}",
        "seeds": str(len(method.finished)),
        "score": _score(method.mean("score"), method.metric),
        "difference": "reference"
        if method.is_reference
        else _difference(study.against(method), method.metric),
        "uplink": _size(method.mean("uplink_bytes")),
        "downlink": _size(method.mean("downlink_bytes")),
        "total": _size(method.mean("total_bytes")),
        "wire": _size(method.mean("wire_bytes")),
        "reach": _size(reached.spent)
        if reached.reached == reached.of
        else f"{reached.reached} of {_seeds(reached.of)}",
        "uplink_reach": _size(study.to_reach(method, "uplink_bytes").spent)
        if reached.reached == reached.of
        else "",
        "less": "" if method.is_reference or reached.ratio is None else ratio(reached.ratio),
        "time": _mean(method.mean("simulated_seconds"), duration),
        "energy": _mean(method.mean("joules"), joules),
        "stored": _size(method.mean("weight_bytes")),
        "zeros": "" if zeros is None or zeros.mean < _FEW_ZEROS else f"{100 * zeros.mean:.0f} %",
    }


def used(study: Study, task: str, rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the headers of a task's columns that have a value."""
    headers = {**HEADERS, "score": study.metric(task).title}
    return {key: text for key, text in headers.items() if any(row[key] for row in rows)}


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def _score(value: Interval | None, metric: Metric) -> str:
    if value is None or value.half is None:
        return metric.text(None if value is None else value.mean)
    if metric.percent:
        return f"{100 * value.mean:.1f} ± {100 * value.half:.1f} %"
    return f"{value.mean:.4g} ± {value.half:.2g}"


def _difference(value: Paired | None, metric: Metric, *, short: bool = False) -> str:
    """Return the difference (of shares in percentage points), p and the pairs.

    >>> from fedq.metrics import ACCURACY, MAE
    >>> _difference(Paired(Interval(-0.0123, 0.01, 3), 0.034), ACCURACY)
    '-1.2 ± 1.0 (p 0.03, n 3)'
    >>> _difference(Paired(Interval(-0.0123, 0.01, 3), 0.034), MAE, short=True)
    '-0.0123 (p 0.03)'
    """
    if value is None:
        return ""
    difference, half = metric.scale * value.difference.mean, value.difference.half
    if metric.percent:
        text = f"{0.0 if abs(difference) < 0.05 else difference:+.1f}"  # no minus before a zero
    else:
        text = f"{difference:+.3g}"
    if half is None or value.p is None:
        return text
    p = f"p {value.p:.1g}" if value.p >= 1e-4 else "p < 1e-4"
    if short:
        return f"{text} ({p})"
    spread = f"{metric.scale * half:.1f}" if metric.percent else f"{half:.2g}"
    return f"{text} ± {spread} ({p}, n {value.difference.n})"


def _size(value: Interval | None) -> str:
    return _mean(value, size)


def _mean(value: Interval | None, text: Any) -> str:
    return "" if value is None else str(text(value.mean))


def _escape(text: str) -> str:
    r"""Return text for LaTeX.

    >>> _escape("50 % of a_b")
    '50 \\% of a\\_b'
    """
    return text.translate(_TEX).replace(" *", "$^*$")


_TEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
)
