"""A plot of an outcome as inline SVG, whose colours are those of the page around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from fedq.robustness.outcome import Curve, Plot

_WIDTH, _HEIGHT = 420.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 8.0, 38.0
_COLOURS = 6
_MARKED = 25  # points of a curve up to which each gets a mark


def figure(plot: Plot) -> str:
    """Return a plot with its title and legend as HTML; points that cannot be drawn are left out."""
    drawn = [(curve, _points(curve, plot.log)) for curve in plot.curves]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    if not xs:
        return ""
    to_x, x_ticks = _axis(xs, plot.log, _LEFT, _WIDTH - _RIGHT)
    to_y, y_ticks = _axis(ys, plot.log, _HEIGHT - _BOTTOM, _TOP)
    label = f"{plot.title}: {plot.y_label} against {plot.x_label}"
    parts = [f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(label)}">']
    parts += [
        f'<line class="grid-line" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{to_y(y):.1f}" '
        f'y2="{to_y(y):.1f}"/><text x="{_LEFT - 6:g}" y="{to_y(y) + 3.5:.1f}" '
        f'text-anchor="end">{_tick(y)}</text>'
        for y in y_ticks
    ]
    parts += [_centred(to_x(x), _HEIGHT - _BOTTOM + 15, _tick(x)) for x in x_ticks]
    parts.append(_centred((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, plot.x_label))
    for number, (curve, points) in enumerate(drawn):
        places = [(to_x(x), to_y(y)) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="{_style(number, curve)}" points="{line}"/>')
        if len(places) <= _MARKED and not curve.dashed:
            kind = f"k{number % _COLOURS}"
            parts += [
                f'<circle class="{kind}" r="2.5" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in places
            ]
    parts.append("</svg>")
    legend = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><line class="{_style(i, curve)}" x1="1" '
        f'x2="25" y1="5" y2="5"/></svg>{escape(curve.label)}</li>'
        for i, (curve, _) in enumerate(drawn)
    )
    return (
        f"<figure><figcaption>{escape(plot.title)}</figcaption>\n"
        f'<p class="label">{escape(plot.y_label)}</p>{"".join(parts)}\n'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _centred(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _style(number: int, curve: Curve) -> str:
    return f"curve k{number % _COLOURS}{' dashed' if curve.dashed else ''}"


def _points(curve: Curve, log: bool) -> list[tuple[float, float]]:
    pairs = zip(curve.x, curve.y, strict=True)
    return [
        (x, y)
        for x, y in pairs
        if math.isfinite(x) and math.isfinite(y) and (not log or (x > 0 and y > 0))
    ]


def _axis(
    values: Sequence[float], log: bool, start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """Return a map from values to places, and the values to write at it."""
    low, high = min(values), max(values)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        every = -(-(last - first) // 6)
        ticks = [10.0**power for power in range(first, last + 1, every)]
        scale = (end - start) / (last - first)
        return (lambda value: start + scale * (math.log10(value) - first)), ticks
    step = _step(high - low or abs(high) or 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [step * i for i in range(first, last + 1)]
    scale = (end - start) / (step * (last - first))
    return (lambda value: start + scale * (value - step * first)), ticks


def _step(extent: float) -> float:
    """Return a round number of which four to seven go into an extent."""
    power = 10.0 ** math.floor(math.log10(extent / 5))
    return next(power * n for n in (1, 2, 2.5, 5, 10) if extent / (power * n) <= 6)


def _tick(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"
