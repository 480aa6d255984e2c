"""Codecs at the rate-distortion frontier: real bytes, error, bias and speed, beside the limits.

Every codec encodes the vector of every client with a seed of its own. Bits are lengths of payloads,
headers included, times 8 over d. Errors are normalised by the clients' mean power:
`NMSE` is one client's `|y - x|^2 / |x|^2`, `of 10` and `of 100` that of the mean of so many clients
against the mean of their vectors, from the errors of all pairs of clients measured; empty where its
standard error is above 5 %. `bias` is 100 NMSE(100) / NMSE(1), with one standard error: 1 where
errors average out, 100 where they do not.
`limit` is NMSE over what no code can beat at these bits on Gaussian vectors: `4^-R`, and
`1/(4^R - 1)` for unbiased ones; other vectors have structure and allow less than 1. Speeds are MB
of float32 per second of CPU, one thread, the best call. The vectors are those of `vectors.py`.

Peers run in environments of their own (`--peers all --install` makes them), on the first clients'
vectors. Where a peer only holds arrays and sends nothing, its bytes are those arrays' sizes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import _common
import _peers
import matplotlib.pyplot as plt
import numpy as np
import torch
import vectors as sets
from matplotlib.axes import Axes
from numpy.typing import NDArray

import fedq
from fedq import registry, wire
from fedq.errors import FedqError
from fedq.layout import Layout, Vector
from fedq.random import derive
from fedq.report.plots import COLOURS, FAINT

Options = Mapping[str, Any]
#: Options along a curve; what differs otherwise is another curve.
RATES = ("bits", "code", "fraction", "levels", "rank")
PEER, PEER_CLIENTS = " (peer)", 10  # peers are slow: minutes for what takes ours seconds


def _sweep(name: str, option: str, values: Sequence[float], **others: Any) -> list[Any]:
    return [(name, {option: value, **others}) for value in values]


#: The codecs of the table and the picture; those that are not registered are left out.
FRONTIER: list[tuple[str, Options]] = [
    *_sweep("dtcq", "bits", (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 3.0, 4.0)),
    *_sweep("low_rank", "bits", (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0)),
    *_sweep("rdo_tcq", "bits", (0.025, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 3.0)),
    *_sweep("low_rank", "bits", (0.025, 0.05, 0.08, 0.13, 0.2, 0.4, 0.9, 1.7), inner="rdo_tcq"),
    *_sweep("eden", "bits", (0.0125, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)),
    *_sweep("subset", "bits", (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4), inner="dtcq"),
    *_sweep("dtcq", "bits", (1.0, 2.0, 3.0, 4.0), states=64),
    *_sweep("uniform", "bits", (4, 5, 6), rounding="dithered", scale="model"),
    ("drive", {}),
    *_sweep("quic_fl", "bits", (1, 2, 3, 4)),
    *_sweep("qsgd", "levels", (1, 4, 16, 127)),
    *_sweep("correlated", "levels", (2, 4, 16)),
    *_sweep("random_k", "fraction", (0.01, 0.1)),
    ("natural", {}),
    ("ternary", {}),
    *_sweep("power_sgd", "rank", (1, 4, 16)),
    *_sweep("top_k", "fraction", (0.001, 0.01, 0.1)),
    *_sweep("stc", "fraction", (0.01, 0.1)),
    ("sign", {}),
    *_sweep("codebook", "bits", (1, 2, 4)),
    *(("blockwise", {"code": code}) for code in ("nf4", "fp4", "dynamic8")),
    *(("uniform", {"entropy": entropy}) for entropy in ("max", "fast", "packed")),
]


@dataclass(frozen=True)
class Coded:
    """One vector's way through a codec; seconds are of CPU."""

    y: Vector
    bytes: int
    header_bytes: int | None
    encode_s: float
    decode_s: float


@dataclass(frozen=True)
class Contestant:
    """A codec as the benchmark sees it: a name, the curve that it is a point of, and its work."""

    name: str
    curve: str
    unbiased: bool
    code: Callable[[Vector, Layout, int], Coded]
    clients: int | None = None
    note: str = ""


def main() -> None:
    parser = _common.parser(__doc__)
    sets.add_options(parser)
    parser.add_argument("--codecs", nargs="*", help="names of codecs; default: all of the list")
    parser.add_argument("--all", action="store_true", help="every example of every codec too")
    _peers.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.vectors, options.clients = ["sparse", "embedding"], 2
    torch.set_num_threads(1)
    left_out: list[str] = []
    groups = []
    with ExitStack() as stack:
        contestants = list(ours(options.codecs, options.all, left_out))
        for peer in _peers.start(stack, options, left_out):
            contestants += peers(peer)
        for name in options.vectors:
            clients = options.clients
            if name in ("sparse", "embedding") and not options.quick:
                clients *= 50  # errors on few coordinates average slowly
            vectors = sets.load(name, clients, options.cache)
            groups.append(_group(contestants, vectors, options.seed))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(groups, options.out / "codecs")
    text = [str(__doc__).strip(), "![NMSE against bits](codecs.svg)"]
    for group in groups:
        title = f"{group['vectors']}: {group['parameters']:,} coordinates, {group['clients']:,}"
        text += [f"## {title} {group['what']}", _common.table(COLUMNS, map(_shown, group["rows"]))]
        text += [f"- {line}" for line in group["failed"]]
    left_out = list(dict.fromkeys(left_out))
    text += [f"Left out: {'; '.join(left_out)}."] if left_out else []
    _common.write(
        options.out,
        "codecs",
        "Codecs at the rate-distortion frontier",
        text,
        {"seed": options.seed, "groups": groups, "left_out": left_out},
    )


# --- contestants -------------------------------------------------------------------------------


def ours(names: list[str] | None, examples: bool, left_out: list[str]) -> Iterator[Contestant]:
    """Yield the codecs of the list, and on demand every example, by names if there are any."""
    chosen = list(FRONTIER)
    if examples:
        chosen += [(n, o) for n, cls in registry.table("codec").items() for o in cls.examples]
    for name, options in chosen:
        if names is not None and name not in names:
            continue
        if name not in registry.table("codec"):
            left_out.append(f"{name} is not registered")
            continue
        try:
            codec = fedq.build("codec", name, **options)
        except FedqError as error:
            left_out.append(f"{name}: {error}")
            continue
        rest = {k: v for k, v in registry.to_config(codec).items() if k not in RATES}
        curve = registry.describe(rest, "codec")
        yield Contestant(registry.describe(codec), curve, codec.unbiased, _code(codec))


def _code(codec: Any) -> Callable[[Vector, Layout, int], Coded]:
    def code(x: Vector, layout: Layout, seed: int) -> Coded:
        start = time.process_time()
        payload = codec.encode(x, layout, seed)
        between = time.process_time()
        y = codec.decode(payload, layout)
        end = time.process_time()
        header = len(payload) - len(wire.open_frame(payload, layout).body)
        return Coded(y, len(payload), header, between - start, end - between)

    return code


def peers(peer: _peers.Peer) -> Iterator[Contestant]:
    """Yield a peer's settings."""

    def settled(settings: Options) -> Callable[[Vector, Layout, int], Coded]:
        def code(x: Vector, layout: Layout, seed: int) -> Coded:
            answer, y = peer.code(x, layout, seed, settings)
            return Coded(y, answer["bytes"], None, answer["encode_s"], answer["decode_s"])

        return code

    recipe = peer.recipe
    note = "" if recipe.sends else "in memory"
    for settings in recipe.settings:
        text = ", ".join(f"{key}={value}" for key, value in settings.items())
        name, curve = f"{peer.name}({text})", peer.name + PEER
        yield Contestant(name, curve, recipe.unbiased, settled(settings), PEER_CLIENTS, note)


# --- measuring ---------------------------------------------------------------------------------


def _group(contestants: Sequence[Contestant], vectors: sets.Vectors, seed: int) -> dict[str, Any]:
    rows, failed = [], []
    for contestant in contestants:
        try:
            rows.append(measure(contestant, vectors, seed))
        except FedqError as error:
            failed.append(f"{contestant.name} failed: {error}")
            continue
        print(vectors.name, _shown(rows[-1]), file=sys.stderr, flush=True)
    return {
        "vectors": vectors.name,
        "parameters": vectors.layout.size,
        "clients": len(vectors.rows),
        "what": "seeds" if vectors.shared else "clients",
        "rows": rows,
        "failed": failed,
    }


def measure(contestant: Contestant, vectors: sets.Vectors, seed: int) -> dict[str, Any]:
    """Return a row of the table."""
    layout = vectors.layout
    rows = vectors.rows[: contestant.clients]
    total: NDArray[np.float64] = np.zeros(layout.size)
    squares = np.zeros(layout.size)
    power = size = 0.0
    encode_s = decode_s = math.inf
    for client, x in enumerate(rows):
        x = np.ascontiguousarray(x)
        coded = contestant.code(x, layout, derive(seed, "codec", client))
        error = coded.y.astype(np.float64) - x
        total += error
        squares += error * error
        power += float(np.sum(np.square(x, dtype=np.float64)))
        size += coded.bytes
        encode_s, decode_s = min(encode_s, coded.encode_s), min(decode_s, coded.decode_s)
    n = len(rows)
    bits = 8 * size / n / layout.size
    nmse = float(squares.sum()) / power
    alike, uncertain = _coherence(total, squares, n)
    return {
        "codec": contestant.name,
        "curve": contestant.curve,
        "clients": n,
        "bits_per_parameter": bits,
        "bytes": size / n,
        "header_bytes": coded.header_bytes,
        "nmse": nmse,
        "nmse_of_10": _mean_of(10, nmse, alike, uncertain),
        "nmse_of_100": _mean_of(100, nmse, alike, uncertain),
        "bias": 1 + 99 * alike,
        "bias_error": 99 * uncertain,
        "unbiased": contestant.unbiased,
        "limit": nmse / limit(bits, contestant.unbiased),
        "encode_mb_s": x.nbytes / encode_s / 1e6,
        "decode_mb_s": x.nbytes / decode_s / 1e6,
        "note": contestant.note,
    }


def _coherence(
    total: NDArray[np.float64], squares: NDArray[np.float64], n: int
) -> tuple[float, float]:
    """Return the mean inner product of two clients' errors over their power, and its deviation.

    With it, n clients' mean has the error ``NMSE / n (1 + (n - 1) coherence)``. The deviation is
    that of errors without bias, independent between coordinates.

    Args:
      total: (d,) sum of the errors.
      squares: (d,) sum of their squares.
      n: Number of clients.
    """
    power = float(squares.sum())
    if power == 0 or n < 2:
        return 0.0, 0.0
    mean = (float(np.sum(total**2)) - power) / ((n - 1) * power)
    return mean, math.sqrt(2 * float(np.sum(squares**2))) / power / math.sqrt(n * (n - 1))


def _mean_of(n: int, nmse: float, alike: float, uncertain: float) -> float | None:
    """Return the NMSE of a mean of n clients, unless it is not known within 5 %."""
    ratio = 1 + (n - 1) * alike
    return nmse / n * ratio if (n - 1) * uncertain < 0.05 * ratio else None


def limit(bits: float, unbiased: bool) -> float:
    """Return the least NMSE of a code of Gaussian vectors at this many bits per coordinate.

    >>> [round(limit(r, False), 4) for r in (1, 2)], [round(limit(r, True), 4) for r in (1, 2)]
    ([0.25, 0.0625], [0.3333, 0.0667])
    """
    return 1 / (4**bits - 1) if unbiased else 4**-bits


COLUMNS = {
    "codec": "codec",
    "bits_per_parameter": "bits/parameter",
    "header_bytes": "header, bytes",
    "nmse": "NMSE",
    "nmse_of_10": "of 10",
    "nmse_of_100": "of 100",
    "bias": "bias",
    "unbiased": "unbiased",
    "limit": "limit",
    "encode_mb_s": "encode, MB/s",
    "decode_mb_s": "decode, MB/s",
    "note": "bytes are",
}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in COLUMNS} | {
        "bias": f"{row['bias']:.3f} ± {row['bias_error']:.3f}",
        "unbiased": "yes" if row["unbiased"] else "no",
    }


# --- picture -----------------------------------------------------------------------------------


def draw(groups: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw NMSE against bits, one panel per set of vectors, as ``path`` SVG and PNG."""
    names = list(dict.fromkeys(row["curve"] for group in groups for row in group["rows"]))
    own = [name for name in names if not name.endswith(PEER)]
    lines = [name for name in own if any(_points(group, name) > 1 for group in groups)]
    singles = [name for name in own if name not in lines]
    styles: dict[str, Options] = {}
    for i, name in enumerate(lines):  # the first are the flagships
        colour, marker = COLOURS[i % len(COLOURS)], "os^Dv"[i // len(COLOURS) % 5]
        width = 1.8 if i < len(COLOURS) else 0.8
        styles[name] = {"color": colour, "marker": marker, "linewidth": width, "markersize": 4}
    for i, name in enumerate(singles):
        marker = "PX*hp<>8d"[i % 9]
        styles[name] = {"color": FAINT, "marker": marker, "linestyle": "", "markersize": 6}
    for i, name in enumerate(name for name in names if name.endswith(PEER)):
        marker = "osD"[i % 3]
        styles[name] = {"color": "black", "marker": marker, "linestyle": ":", "markersize": 4}
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(5.2 * across, 4 * down + 1.2), squeeze=False, layout="constrained"
    )
    for panel, group in zip(panels.flat, groups, strict=False):
        _panel(panel, group, styles)
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    seen = {
        label: handle
        for panel in panels.flat
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=2 * across, frameon=False
    )
    figure.suptitle("Error of one client against real bits; filled: unbiased, hollow: biased")
    for kind in ("svg", "png"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=160)
    plt.close(figure)


def _points(group: Mapping[str, Any], curve: str) -> int:
    return sum(row["curve"] == curve for row in group["rows"])


def _panel(axes: Axes, group: Mapping[str, Any], styles: Mapping[str, Options]) -> None:
    rows = [row for row in group["rows"] if row["nmse"] > 0]
    r = np.geomspace(0.01, 8, 200)
    for unbiased, dash in ((False, "-"), (True, "--")):
        bound = [limit(bits, unbiased) for bits in r]
        label = "Gaussian limit, unbiased" if unbiased else "Gaussian limit"
        axes.plot(r, bound, dash, color=FAINT, linewidth=1, label=label)
    by_curve = sorted(rows, key=lambda row: (row["curve"], row["bits_per_parameter"]))
    for curve, found in groupby(by_curve, key=lambda row: row["curve"]):
        points = list(found)
        fill = "full" if points[0]["unbiased"] else "none"
        bits = [row["bits_per_parameter"] for row in points]
        axes.plot(
            bits, [row["nmse"] for row in points], label=curve, fillstyle=fill, **styles[curve]
        )
    axes.set(xscale="log", yscale="log", title=f"{group['vectors']}, d = {group['parameters']:,}")
    axes.set(xlabel="bits per parameter", ylabel="NMSE", xlim=(0.01, 40), ylim=(1e-4, 30))
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
