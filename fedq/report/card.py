"""A robustness card as one self-contained page, and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedq import registry
from fedq.report._figure import figure
from fedq.robustness.card import FAMILIES, STATEMENT, Card, Result
from fedq.robustness.outcome import Gate, Outcome

PAGE = "card.html"
_BOUNDS = {"upper": "at most", "lower": "at least", "estimate": ""}
_STATUS = {
    "measured": "measured",
    "invalid": "INVALID",
    "withheld": "WITHHELD",
    "skipped": "skipped",
    "failed": "FAILED",
    "error": "could not run",
}
_STYLE = {
    "measured": "green",
    "invalid": "red",
    "withheld": "yellow",
    "skipped": "dim",
    "failed": "bold red",
    "error": "bold red",
    "missing": "yellow",
}
_WHY = {
    "invalid": "A gate failed, so the figure says nothing:",
    "withheld": "No claim is made:",
    "skipped": "Does not apply:",
    "failed": "A promise was broken:",
}


def figure_text(value: float | None, unit: str) -> str:
    """Return a figure in its unit.

    >>> figure_text(0.2346, "share"), figure_text(41.96, "dB"), figure_text(None, "AUC")
    ('23.5 %', '42.0 dB', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if unit == "share":
        return f"{100 * value:.1f} %" if value == 0 or value >= 0.01 else f"{100 * value:.2g} %"
    if unit == "dB":
        return f"{value:.1f} dB"
    if unit == "count":
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return {"epsilon": f"ε {text}", "AUC": f"AUC {text}", "": text}.get(unit, f"{text} {unit}")


# --- terminal ------------------------------------------------------------------------------------


def table(card: Card) -> RenderableType:
    """Return one row per figure, families in order, the worst first; reasons below."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    rows.add_column("figure", overflow="fold", ratio=1)
    for header in ("deployed", "float twin"):
        rows.add_column(header, justify="right", no_wrap=True)
    rows.add_column("", no_wrap=True)
    notes = []
    for family, results in _by_family(card):
        rows.add_row(Text(FAMILIES.get(family, family), "bold"))
        for result in results:
            if result.state != "done":
                word = _STATUS.get(result.state, result.state)
                rows.add_row(Text(f"  {result.key}"), "", "", Text(word, _STYLE[result.state]))
                notes += [f"{result.key}: {result.reason}"] if result.reason else []
            for outcome in result.worst_first:
                bound = _BOUNDS[outcome.bound]
                known = outcome.value is not None and outcome.status in ("measured", "failed")
                rows.add_row(
                    Text(f"  {outcome.name}: {outcome.metric}"),
                    Text(f"{bound} {figure_text(outcome.value, outcome.unit)}".strip())
                    if known
                    else Text("-", "dim"),
                    Text(figure_text(outcome.twin, outcome.unit)) if known else Text("-", "dim"),
                    Text(_STATUS[outcome.status], _STYLE[outcome.status]),
                )
                notes += [f"{outcome.name}: {outcome.reason}"] if outcome.reason else []
    lines = [*notes, STATEMENT]
    if card.missing:
        lines.insert(0, f"Not evaluated yet: {', '.join(card.missing)}.")
    return Group(rows, Text(), *(Text(line, overflow="fold") for line in lines))


def _by_family(card: Card) -> list[tuple[str, list[Result]]]:
    known = [*FAMILIES, *sorted({r.family for r in card.results} - {*FAMILIES})]
    grouped = [(family, [r for r in card.results if r.family == family]) for family in known]
    return [(family, results) for family, results in grouped if results]


# --- page ----------------------------------------------------------------------------------------


def page(card: Card) -> str:
    """Return the card as HTML: no script, nothing from elsewhere, light and dark."""
    families = _by_family(card)
    body = [
        _header(card),
        *(_family(family, results) for family, results in families),
        _footer(card),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(card.run['name'])}: robustness card</title>\n"
        f"<style>\n{_css()}</style>\n</head>\n<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _css() -> str:
    return Path(__file__).with_name("card.css").read_text(encoding="utf-8")


def _header(card: Card) -> str:
    run, counts = card.run, card.counts
    chips = "".join(
        f'<li class="chip {status}">{counts[status]} {escape(word)}</li>'
        for status, word in _STATUS.items()
        if counts[status]
    )
    config = run["config"]
    facts = {
        "model": registry.describe(config["model"], "model"),
        "data": registry.describe(config["data"], "data"),
        "quantization": registry.describe(config["quantization"]),
        "uplink": registry.describe(config["codec"], "codec"),
        "judged by": "integer arithmetic" if run["integer"] else "fake quantizers",
        "model SHA-256": f"{run['model_sha256'][:16]}…",
    }
    missing = (
        '<p class="banner" role="status"><b>Partial card.</b> Not evaluated yet: '
        f"{escape(', '.join(card.missing))}.</p>"
        if card.missing
        else ""
    )
    accuracy = _pair(run["accuracy"], run["float_accuracy"], "share", "")
    return (
        f'<header>\n<p class="kicker">Robustness and privacy card · suite {escape(card.suite)}'
        "</p>\n"
        f"<h1>{escape(run['name'])}</h1>\n"
        f'<div class="top"><div class="clean"><p class="label">Accuracy on '
        f"{run['test_examples']:,} clean test examples</p>{accuracy}</div>{_facts(facts)}</div>\n"
        f'<ul class="chips">{chips}</ul>\n{missing}'
        f'<p class="statement">{escape(STATEMENT)}</p>\n{_contents(card)}</header>\n'
    )


def _contents(card: Card) -> str:
    """Return links to the families, each with its worst status."""
    links = []
    for family, results in _by_family(card):
        statuses: list[str] = [o.status for r in results for o in r.outcomes]
        statuses += [r.state for r in results if r.state != "done"]
        worst = next((s for s in ("failed", "error", "invalid", "withheld") if s in statuses), "")
        title = escape(FAMILIES.get(family, family))
        links.append(f'<li class="{worst}"><a href="#{escape(family)}">{title}</a></li>')
    return f'<nav aria-label="families"><ul>{"".join(links)}</ul></nav>\n'


def _family(family: str, results: Sequence[Result]) -> str:
    title = escape(FAMILIES.get(family, family))
    parts = []
    for result in results:
        parts.append(_undone(result) if result.state != "done" else "")
        parts += [_outcome(outcome) for outcome in result.worst_first]
    return (
        f'<section id="{escape(family)}">\n<h2>{title}</h2>\n<div class="grid">\n'
        f"{''.join(parts)}</div>\n</section>\n"
    )


def _undone(result: Result) -> str:
    status = "withheld" if result.state == "missing" else result.state
    text = {"missing": "not evaluated yet"}.get(result.state, _STATUS.get(result.state, ""))
    why = {"error": "It could not be carried out:", "skipped": "Does not apply:"}
    reason = f"{why.get(result.state, '')} {result.reason}".strip()
    return (
        f'<article class="{status}">\n<h3>{escape(result.key)}'
        f'<span class="badge {status}">{escape(text)}</span></h3>\n'
        f'<p class="reason">{escape(reason)}</p>\n</article>\n'
    )


def _outcome(outcome: Outcome) -> str:
    status = outcome.status
    why = f"{_WHY[status]} {outcome.reason}" if status in _WHY else outcome.reason
    wide = " wide" if outcome.plot else ""
    parts = [
        f'<article class="{status}{wide}">\n<h3>{escape(outcome.name)}',
        f'<span class="badge {status}">{escape(_STATUS[status])}</span></h3>\n',
        f'<div class="cols"><div><p class="label">{escape(outcome.metric)}</p>\n',
    ]
    if outcome.value is not None:
        parts.append(_pair(outcome.value, outcome.twin, outcome.unit, _BOUNDS[outcome.bound]))
    if outcome.interval is not None:
        low, high = (figure_text(end, outcome.unit) for end in outcome.interval)
        percent = f"{100 * outcome.confidence:g}"
        parts.append(f'<p class="interval">{low} to {high} at {percent} % confidence</p>\n')
    if why:
        parts.append(f'<p class="reason">{escape(why)}</p>\n')
    if outcome.threat:
        parts.append(f'<p class="threat">{escape(outcome.threat)}</p>\n')
    parts.append(f"{_gates(outcome.gates)}</div>")
    parts.append(f"{figure(outcome.plot) if outcome.plot else ''}</div>\n")
    parts.append(_disclosure("Budget", outcome.budget) + _disclosure("Details", outcome.details))
    return "".join(parts) + "</article>\n"


def _pair(value: float, twin: float | None, unit: str, bound: str) -> str:
    """Return the deployed model's figure beside its twin's, shares as bars, too."""
    rows = []
    for label, of, kind in (("deployed", value, "own"), ("float twin", twin, "twin")):
        if of is None:
            continue
        bar = ""
        if unit == "share" and math.isfinite(of):
            width = 100 * min(max(of, 0.0), 1.0)
            bar = f'<span class="bar"><i style="width:{width:.1f}%"></i></span>'
        word = f"<small>{bound}</small> " if bound else ""
        rows.append(
            f'<div class="{kind}"><dt>{label}</dt><dd>{word}<b>{escape(figure_text(of, unit))}</b>'
            f"{bar}</dd></div>"
        )
    return f'<dl class="pair">{"".join(rows)}</dl>\n'


def _gates(gates: Iterable[Gate]) -> str:
    items = "".join(
        f'<li class="{"ok" if gate.passed else "bad"}"><b>{escape(gate.name)}:</b> '
        f'<span class="sr">{"held" if gate.passed else "failed"}: </span>'
        f"<span>{escape(gate.detail)}</span></li>"
        for gate in gates
    )
    return f'<ul class="gates" aria-label="gates">{items}</ul>\n' if items else ""


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{_value(value)}</dd></div>"
        for key, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def _value(value: Any) -> str:
    """Return any JSON value as HTML: mappings as facts, a list of mappings as a table."""
    if isinstance(value, Mapping):
        return _facts(value)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Mapping) for item in value):
            return _rows(value)
        return escape(", ".join(_plain(item) for item in value))
    return escape(_plain(value))


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _rows(items: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for item in items for key in item))
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_value(item.get(column))}</td>' for column in columns)}</tr>"
        for item in items
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _disclosure(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    return f"<details><summary>{title}</summary>{_facts(values)}</details>\n"


def _footer(card: Card) -> str:
    rows = [
        {
            "evaluation": registry.describe(result.evaluation, "evaluation"),
            "state": {"done": "done"}.get(result.state, _STATUS.get(result.state, result.state)),
            "CPU s": round(result.cpu_seconds, 1),
            "date": result.date or "-",
        }
        for result in card.results
    ]
    versions = {key: value for key, value in card.versions.items() if value is not None}
    return (
        f"<footer>\n<h2>How this was made</h2>\n{_rows(rows)}"
        f"{_disclosure('Machine', card.hardware)}{_disclosure('Versions', versions)}"
        f"{_disclosure('Configuration of the run', card.run['config'])}"
        f'<p class="fine">Seed {card.seed} · {escape(card.date)} · model '
        f"<code>{escape(card.run['model_sha256'])}</code></p>\n</footer>\n"
    )
