"""What is to be seen of a fleet: its devices, what they report, and the newest run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedq.errors import FedqError
from fedq.fleet import control
from fedq.fleet.files import Fleet, lock_holder, read_json
from fedq.metrics import metric_of
from fedq.progress import megabytes
from fedq.results import read_rounds


def collect(fleet: Fleet) -> dict[str, Any]:
    """Return the state of a fleet as plain data; of a stopped one, what is on disk."""
    up = fleet.pid() is not None
    seen: Mapping[str, Any] = {}
    states: dict[bytes, str] = {}
    if up:
        seen = control.seen(fleet)
        with control.connected(fleet) as client:
            states = {node.public_key: node.status for node in control.nodes(client)}
    now = time.time()
    devices = []
    for name, key in fleet.nodes().items():
        found = seen.get(name, {})
        report = found.get("report", {})
        last_s = found.get("last_s")
        devices.append(
            {
                "name": name,
                "status": states.get(key, "unknown" if not up else "not registered"),
                "seen_s_ago": round(now - last_s, 1) if last_s else None,
                "up_bytes": found.get("up_bytes", 0),
                "down_bytes": found.get("down_bytes", 0),
                "refused": found.get("refused", 0),
                "report": report,
            }
        )
    return {
        "name": fleet.name,
        "server": fleet.device_address,
        "up": up,
        "devices": devices,
        "run": _run(fleet),
    }


def _run(fleet: Fleet) -> dict[str, Any] | None:
    if not fleet.path("run.json").exists():
        return None
    found = read_json(fleet.path("run.json"), "")
    rounds: list[dict[str, Any]] = []
    with contextlib.suppress(FedqError):
        rounds = read_rounds(Path(found["path"]))
    last = rounds[-1] if rounds else {}
    judged = [row for row in rounds if metric_of(row)]
    metric = metric_of(judged[-1]) if judged else None
    return {
        **found,
        "going_on": lock_holder(fleet.path("run.lock")) is not None,
        "round": last.get("round", 0),
        "metric": metric.name if metric else None,
        **({metric.name: judged[-1][metric.name]} if metric else {}),
        "uplink_bytes": sum(row["uplink_bytes"] for row in rounds),
        "downlink_bytes": sum(row["downlink_bytes"] for row in rounds),
        "rejected": last.get("rejected", {}),
    }


def render(found: Mapping[str, Any]) -> Group:
    """Return the state as a table of devices, with a line above and below."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("device", "status", "seen", "up", "down", "°C", "memory", "load", "fedq", ""):
        right = title in ("seen", "up", "down", "°C", "memory", "load")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for device in found["devices"]:
        report, seen = device["report"], device["seen_s_ago"]
        table.add_row(
            device["name"],
            Text(device["status"], "green" if device["status"] == "online" else "yellow"),
            "never" if seen is None else f"{seen:.0f} s ago",
            megabytes(device["up_bytes"]),
            megabytes(device["down_bytes"]),
            str(report.get("temperature_c", "")),
            f"{report['memory_mb']} MB" if "memory_mb" in report else "",
            str(report.get("load", "")),
            str(report.get("fedq", "")),
            "throttled" if report.get("throttled") else "",
        )
    head = f"fleet '{found['name']}', {found['server']}, {'up' if found['up'] else 'down'}"
    return Group(Text(head), table, Text(_run_line(found["run"])))


def _run_line(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return "no run yet: fedq fleet run"
    metric = metric_of(run)
    score = f", {metric.title} {metric.text(run[metric.name])}" if metric else ""
    sent = f"up {megabytes(run['uplink_bytes'])}, down {megabytes(run['downlink_bytes'])}"
    state = "going on" if run["going_on"] else "over"
    lost = "".join(f", {count} {why}" for why, count in sorted(run["rejected"].items()) if count)
    return f"run {run['path']}: round {run['round']}/{run['rounds']}, {state}{score}, {sent}{lost}"
