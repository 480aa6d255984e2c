"""What is made for docs/scale.md: tables of measured constants, and of what they come to.

Constants are read from benchmarks/results; the plan multiplies them and says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import _make
from _make import DOCS, REPOSITORY

PAGE = DOCS / "scale.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
#: Of a plan: parameters of the model, and the share of devices that a round asks.
PARAMETERS, SHARE = 1_199_882, 0.01
#: Seconds for which a device's request for work stays open, and between its heartbeats.
WAIT_S, HEARTBEAT_S = 90.0, 90.0
#: Devices that one edge serves.
PER_EDGE = 10_000
PLANNED = (10_000, 100_000, 1_000_000)


def results(name: str) -> Mapping[str, Any]:
    """Return the figures of a benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def row(rows: list[Mapping[str, Any]], **wanted: object) -> Mapping[str, Any]:
    """Return the row that has these entries."""
    return next(r for r in rows if all(r[key] == value for key, value in wanted.items()))


def constants() -> dict[str, float]:
    """Return what was measured, per unit."""
    memory, scale, tree = (results(name) for name in ("memory", "scale", "tree"))
    idle, work = (results("fleet")[key] for key in ("idle", "work"))
    bits = results("main_job")["summary"]
    cnn = row(results("codecs")["groups"], vectors="cnn")["rows"]
    coded = row(cnn, codec="uniform(bits=5, rounding=dithered, scale=model)")
    plain = row(memory["rows"], model="1.2 M", codec="identity", clients=1000)
    large = row(memory["rows"], model="10 M", codec="identity", clients=1000)
    asleep = max(results("superlink")["rows"], key=lambda r: r["nodes"])
    exact = row(tree["rows"], codec="null")
    half = row(tree["rows"], codec="fp16")
    own, messages = row(idle, node="fedq"), row(work, node="fedq", work="small messages")
    return {
        "registered, bytes": max(0.0, *scale["bytes_per_client"].values()),
        "took part, bytes": scale["participants"]["bytes_per_client"],
        "in a checkpoint, bytes": scale["participants"]["json_bytes_per_client"],
        "request and reply, us": scale["participants"]["cpu_us_per_client"],
        "float32 update, ns": plain["ns_per_parameter"],
        "decoding, ns": 4e3 / coded["decode_mb_s"],
        "up, bits": bits["uplink_bits_per_parameter"]["mean"],
        "down, bits": bits["downlink_bits_per_parameter"]["mean"],
        "memory, models": large["growth_models"],
        "beside messages, bytes": messages["fixed"],
        "idle, MB": own["mb_day"],
        "request for work, us": asleep["poll_us"],
        "heartbeat, us": asleep["heartbeat_us"],
        "exact sum, bits": exact["bits_per_parameter"],
        "exact sum, ns": exact["server_ns"],
        "half, bits": half["bits_per_parameter"],
        "half, ns": half["server_ns"],
    }


#: What each constant is of, and which script measured it.
MEANINGS = {
    "registered, bytes": ("server memory of a registered simulated client", "scale"),
    "took part, bytes": ("server memory of one that has taken part", "scale"),
    "in a checkpoint, bytes": ("the same, in each checkpoint", "scale"),
    "request and reply, us": ("server CPU of one request and its reply, of 10 parameters", "scale"),
    "float32 update, ns": ("server CPU per parameter of a float32 update, all of it", "memory"),
    "decoding, ns": ("decoding the default codec, per parameter", "codecs"),
    "up, bits": ("an update by the default codec, per parameter", "main_job"),
    "down, bits": ("the model by the default downlink, per parameter", "main_job"),
    "memory, models": (
        "server memory while updates of 10 M parameters stream in, in float32 models",
        "memory",
    ),
    "beside messages, bytes": ("TLS, headers and polls of a device, per round", "fleet"),
    "idle, MB": ("an idle device's traffic, per day", "fleet"),
    "request for work, us": ("CPU of the SuperLink's database, per request for work", "superlink"),
    "heartbeat, us": ("the same, per heartbeat", "superlink"),
    "exact sum, bits": ("an edge's exact sum, per parameter", "tree"),
    "exact sum, ns": ("server CPU per parameter of an edge's exact sum", "tree"),
    "half, bits": ("an edge's mean in fp16, per parameter", "tree"),
    "half, ns": ("server CPU per parameter of that", "tree"),
}


def measured() -> str:
    """Return the constants as a Markdown table."""
    rows = []
    for name, value in constants().items():
        what, script = MEANINGS[name]
        source = f"[{script}](../benchmarks/results/{script}.md)"
        rows.append([what, f"{_digits(value)} {name.rpartition(', ')[2]}", source])
    return _make.table(["of", "measured", "by"], rows)


def plan() -> str:
    """Return what a round and a day come to for fleets of several sizes, as a Markdown table."""
    c = constants()
    per_parameter_ns = c["float32 update, ns"] + c["decoding, ns"]
    update_s = 1e-6 * c["request and reply, us"] + 1e-9 * per_parameter_ns * PARAMETERS
    sum_s = 1e-9 * c["exact sum, ns"] * PARAMETERS
    idle_cores = 1e-6 * (2 * c["request for work, us"] / WAIT_S + c["heartbeat, us"] / HEARTBEAT_S)
    up, down = (
        c[key] / 8 * PARAMETERS + c["beside messages, bytes"] / 2
        for key in ("up, bits", "down, bits")
    )
    columns = []
    for devices in PLANNED:
        cohort, edges = SHARE * devices, max(1, devices // PER_EDGE)
        hop = edges * c["exact sum, bits"] / 8 * PARAMETERS
        columns.append(
            {
                "devices asked in a round": f"{cohort:,.0f}",
                "one server: CPU of a round's updates, s": _digits(cohort * update_s),
                "one server: cores for idle devices": _digits(devices * idle_cores),
                "one server: requests per second of idle devices": _digits(
                    devices * (1 / WAIT_S + 1 / HEARTBEAT_S)
                ),
                "one server: memory of who took part, MB": _digits(
                    1e-6 * devices * c["took part, bytes"]
                ),
                "received in a round, MB": _digits(1e-6 * cohort * up),
                "sent in a round, MB": _digits(1e-6 * cohort * down),
                "idle traffic of all, GB a day": _digits(1e-3 * devices * c["idle, MB"]),
                "edges of 10,000 devices": f"{edges:,}",
                "an edge: CPU of a round's updates, s": _digits(cohort / edges * update_s),
                "an edge: cores for idle devices": _digits(PER_EDGE * idle_cores),
                "edges to root in a round, MB": _digits(1e-6 * hop),
                "root: CPU of a round, s": _digits(edges * sum_s),
            }
        )
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return _make.table(["devices", *(f"{devices:,}" for devices in PLANNED)], rows, right=1)


def _digits(value: float) -> str:
    """Return a number with two significant digits, and whole from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the page with the tables that the results come to."""
    page = _make.with_made(PAGE.read_text(), "constants", measured())
    yield PAGE, _make.with_made(page, "plan", plan())
