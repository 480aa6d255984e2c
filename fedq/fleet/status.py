"""What is to be seen of a fleet: its devices, what they report, and the newest run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedq.errors import FedqError
from fedq.fleet import control, releases
from fedq.fleet.files import Fleet, lock_holder, read_json
from fedq.metrics import metric_of
from fedq.progress import megabytes
from fedq.results import read_rounds

COLUMNS = (
    *("device", "status", "seen", "round", "up", "down", "°C", "memory", "images/s", "uplink"),
    *("fedq", "model", ""),
)
REFRESH_S = 2.0


def watch(fleet: Fleet, console: Console) -> None:
    """Show the state again and again, until it is interrupted."""
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                shown: Group | Text = render(collect(fleet))
            except FedqError as error:  # a server that is started again is back soon
                shown = Text(str(error), "yellow")
            live.update(shown, refresh=True)
            time.sleep(REFRESH_S)


def wait_for_releases(
    fleet: Fleet, names: Sequence[str], wait_s: float
) -> dict[str, dict[str, str]]:
    """Wait until devices run what they should, or say why not; return what each runs and said."""
    deadline = time.monotonic() + wait_s
    while True:
        devices = [one for one in collect(fleet)["devices"] if one["name"] in names]
        found = {one["name"]: _release(one) for one in devices}
        settled = all(one["said"] for one in found.values())
        if settled or not fleet.pid() or time.monotonic() > deadline:
            late = "not yet: it will when it is on line"
            return {name: {**one, "said": one["said"] or late} for name, one in found.items()}
        time.sleep(0.3)


def _release(device: Mapping[str, Any]) -> dict[str, str]:
    report, wanted = device["report"], device["wanted"]
    runs, said = str(report.get("artefact", "")), str(report.get("artefact_state", ""))
    if runs == wanted and (not said or " refused: " in said):  # of another one
        said = "ok"
    elif runs != wanted and not said.startswith(wanted[:12]):
        said = ""
    return {"wanted": wanted, "runs": runs, "said": said}


def collect(fleet: Fleet) -> dict[str, Any]:
    """Return the state of a fleet as plain data; of a stopped one, what is on disk."""
    up = fleet.pid() is not None
    seen: Mapping[str, Any] = {}
    states: dict[bytes, str] = {}
    if up:
        seen = control.seen(fleet)
        with control.connected(fleet) as client:
            states = {node.public_key: node.status for node in control.nodes(client)}
    now, wanted = time.time(), releases.wanted(fleet)
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
                "wanted": wanted.get(name, [""])[-1],
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
    for title in COLUMNS:
        right = title in ("seen", "round", "up", "down", "°C", "memory", "images/s", "uplink")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for device in found["devices"]:
        report, seen = device["report"], device["seen_s_ago"]
        table.add_row(
            device["name"],
            Text(device["status"], "green" if device["status"] == "online" else "yellow"),
            "never" if seen is None else f"{seen:.0f} s ago",
            str(report.get("round", "")),
            megabytes(device["up_bytes"]),
            megabytes(device["down_bytes"]),
            str(report.get("temperature_c", "")),
            f"{report['memory_mb']} MB" if "memory_mb" in report else "",
            f"{report['images_s']:.0f}" if "images_s" in report else "",
            f"{megabytes(int(report['up_bytes_s']))}/s" if "up_bytes_s" in report else "",
            Text(str(report.get("fedq", ""))[:12]),  # a device says so: no markup, and short
            Text(_model(device)),
            "throttled" if report.get("throttled") else "",
        )
    head = f"fleet '{found['name']}', {found['server']}, {'up' if found['up'] else 'down'}"
    return Group(Text(head), table, Text(_run_line(found["run"])))


def _model(device: Mapping[str, Any]) -> str:
    """Return which release a device runs, and what is wrong with that."""
    report, wanted = device["report"], device["wanted"]
    runs, state = str(report.get("artefact", "")), str(report.get("artefact_state", ""))
    text = runs[:8] or ("none" if wanted else "")
    if wanted and wanted != runs:
        refused = state.startswith(wanted[:12])
        text += f", {'refuses' if refused else 'not yet'} {wanted[:8]}"
    elif runs and state not in ("", "ok"):
        text += ", unchecked"
    return text


def _run_line(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return "no run yet: fedq fleet run"
    metric = metric_of(run)
    score = f", {metric.title} {metric.text(run[metric.name])}" if metric else ""
    sent = f"up {megabytes(run['uplink_bytes'])}, down {megabytes(run['downlink_bytes'])}"
    state = "going on" if run["going_on"] else "over"
    lost = "".join(f", {count} {why}" for why, count in sorted(run["rejected"].items()) if count)
    return f"run {run['path']}: round {run['round']}/{run['rounds']}, {state}{score}, {sent}{lost}"
