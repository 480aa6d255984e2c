"""Aggregation rules as their papers write them: slow, plain, one update at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedq.aggregators.blockwise import hostile

Rows = NDArray[np.float64]
Rule = Callable[[Any, Rows, list[float], Rows], Rows]


def apply(aggregator: Any, updates: NDArray[np.float32], weights: Any, reference: Any) -> Rows:
    """Aggregate with the textbook version of a rule."""
    rows = updates.astype(np.float64)
    beside = np.zeros(rows.shape[1]) if reference is None else reference.astype(np.float64)
    return RULES[aggregator.name](aggregator, rows, [float(w) for w in weights], beside)


def _exact(rule: Callable[[list[Fraction], list[float]], Fraction], rows: Rows, w: Any) -> Rows:
    columns = rows.T.tolist()
    return np.array([float(rule([Fraction(x) for x in column], w)) for column in columns])


def mean(_: Any, rows: Rows, weights: list[float], __: Rows) -> Rows:
    def rule(values: list[Fraction], w: list[float]) -> Fraction:
        pairs = zip(values, map(Fraction, w), strict=True)
        return sum((x * share for x, share in pairs), Fraction()) / sum(map(Fraction, w))

    return _exact(rule, rows, weights)


def median(_: Any, rows: Rows, weights: list[float], __: Rows) -> Rows:
    def rule(values: list[Fraction], _: Any) -> Fraction:
        ordered = sorted(values)
        return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2

    return _exact(rule, rows, weights)


def trimmed_mean(agg: Any, rows: Rows, weights: list[float], __: Rows) -> Rows:
    k = math.floor(Fraction(str(agg.trim)) * len(rows))

    def rule(values: list[Fraction], _: Any) -> Fraction:
        return sum(sorted(values)[k : len(values) - k], Fraction()) / (len(values) - 2 * k)

    return _exact(rule, rows, weights)


def norm_bounded(agg: Any, rows: Rows, weights: list[float], _: Rows) -> Rows:
    norms = [math.hypot(*row) for row in rows]
    bound = agg.multiple * float(np.median(norms)) if agg.bound is None else agg.bound
    clipped = [
        row * min(1.0, bound / norm) if norm else row for row, norm in zip(rows, norms, strict=True)
    ]
    return sum(w * row for w, row in zip(weights, clipped, strict=True)) / sum(weights)


def _score(rows: list[Rows], i: int, f: int) -> tuple[float, float]:
    distances = sorted(
        float(np.square(rows[i] - rows[j]).sum()) for j in range(len(rows)) if j != i
    )
    return sum(distances[: max(len(rows) - f - 2, 1)]), sum(distances)


def krum(agg: Any, rows: Rows, _: Any, __: Rows) -> Rows:
    f = hostile(agg.f, len(rows))
    return rows[min(range(len(rows)), key=lambda i: _score(list(rows), i, f))]


def multi_krum(agg: Any, rows: Rows, _: Any, __: Rows) -> Rows:
    n, f = len(rows), hostile(agg.f, len(rows))
    best = sorted(range(n), key=lambda i: _score(list(rows), i, f))[: n - f]
    return rows[best].mean(axis=0)


def bulyan(agg: Any, rows: Rows, _: Any, __: Rows) -> Rows:
    n, f = len(rows), hostile(agg.f, len(rows))
    left, chosen = list(rows), []
    while len(chosen) < n - 2 * f:
        best = min(range(len(left)), key=lambda i: _score(left, i, f))
        chosen.append(left.pop(best))
    result = []
    for column in np.array(chosen).T:
        middle = float(np.median(column))
        near = sorted(column, key=lambda x: abs(x - middle))[: n - 4 * f]
        result.append(sum(near) / len(near))
    return np.array(result)


def geometric_median(_: Any, rows: Rows, __: Any, ___: Rows) -> Rows:
    """Subgradient-free: Weiszfeld from the mean for very long, or the best update."""
    point = np.median(rows, axis=0)
    for _round in range(20_000):
        gaps = np.maximum(np.linalg.norm(rows - point, axis=1), 1e-12)
        after = (rows / gaps[:, None]).sum(axis=0) / (1 / gaps).sum()
        if np.linalg.norm(after - point) < 1e-13 * np.linalg.norm(gaps):
            break
        point = after

    def cost(x: Rows) -> float:
        return float(np.linalg.norm(rows - x, axis=1).sum())

    best = min(rows, key=cost)
    return best if cost(best) < cost(point) * (1 - 1e-12) else point


def _centre(rows: Rows) -> Rows:
    most = len(rows) // 2 + 1
    balls = []
    for row in rows:
        gaps = np.linalg.norm(rows - row, axis=1)
        order = np.argsort(gaps, kind="stable")[:most]
        balls.append((gaps[order[-1]], np.square(gaps[order]).sum(), order))
    *_, order = min(balls, key=lambda ball: ball[:2])
    return rows[order].mean(axis=0)


def centered_clipping(agg: Any, rows: Rows, _: Any, __: Rows) -> Rows:
    point = _centre(rows)
    radius = agg.radius
    if radius is None:
        radius = agg.multiple * float(np.median(np.linalg.norm(rows - point, axis=1)))
    for _round in range(agg.iterations):
        steps = []
        for row in rows:
            gap = float(np.linalg.norm(row - point))
            steps.append((row - point) * (min(1.0, radius / gap) if gap else 1.0))
        point = point + sum(steps) / len(rows)
    return point


def nearest_neighbour_mixing(agg: Any, rows: Rows, _: Any, reference: Rows) -> Rows:
    n, f = len(rows), hostile(agg.f, len(rows))
    mixed = []
    for row in rows:
        order = np.argsort(np.linalg.norm(rows - row, axis=1), kind="stable")[: n - f]
        mixed.append(rows[order].mean(axis=0))
    return RULES[agg.inner.name](agg.inner, np.array(mixed), [1.0] * n, reference)


def fltrust(_: Any, rows: Rows, __: Any, reference: Rows) -> Rows:
    own = np.linalg.norm(reference)
    total, result = 0.0, np.zeros(rows.shape[1])
    for row in rows:
        norm = np.linalg.norm(row)
        if norm and own:
            trust = max(0.0, float(row @ reference / norm / own))
            total += trust
            result += trust * row * own / norm
    return result / total if total else result


def monna(agg: Any, rows: Rows, _: Any, reference: Rows) -> Rows:
    n, f = len(rows), hostile(agg.f, len(rows))
    near = sorted(rows, key=lambda row: float(np.linalg.norm(row - reference)))[: n - f]
    return np.mean(near, axis=0)


def flame(_: Any, rows: Rows, __: Any, ___: Rows) -> Rows:
    n = len(rows)
    norms = np.linalg.norm(rows, axis=1)
    clusters = [{i} for i in range(n)]

    def gap(a: set[int], b: set[int]) -> float:
        return min(1 - rows[i] @ rows[j] / norms[i] / norms[j] for i in a for j in b)

    while max(map(len, clusters)) <= n // 2:
        a, b = min(itertools.combinations(clusters, 2), key=lambda pair: gap(*pair))
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    kept = max(clusters, key=len)
    bound = float(np.median(norms))
    return np.mean([rows[i] * min(1.0, bound / norms[i]) for i in kept], axis=0)


def dnc(agg: Any, rows: Rows, _: Any, __: Rows) -> Rows:
    left = rows
    for _round in range(hostile(agg.f, len(rows))):
        centred = left - left.mean(axis=0)
        direction = np.linalg.svd(centred, full_matrices=False)[2][0]
        left = np.delete(left, np.argmax(np.square(centred @ direction)), axis=0)
    return left.mean(axis=0)


def sign_vote(agg: Any, rows: Rows, _: Any, __: Rows) -> Rows:
    step = np.median(np.abs(rows).mean(axis=1)) if agg.step is None else agg.step
    return step * np.sign(np.sign(rows).sum(axis=0))


RULES: dict[str, Rule] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "norm_bounded": norm_bounded,
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "geometric_median": geometric_median,
    "centered_clipping": centered_clipping,
    "nearest_neighbour_mixing": nearest_neighbour_mixing,
    "fltrust": fltrust,
    "monna": monna,
    "flame": flame,
    "dnc": dnc,
    "sign_vote": sign_vote,
}
