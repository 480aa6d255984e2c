"""The tables of docs/physics.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import _make
from _make import DOCS

from fedq import available, build

PAGE = DOCS / "physics.md"
OWN = {"measured", "ideal"}  # no profiles of something that exists


def devices() -> str:
    """Return the device profiles as a Markdown table."""
    rows = []
    for name in available("device"):
        if name not in OWN:
            device = build("device", name)
            rate = f"{device.training_macs_s / 1e9:.3g}"
            watts = f"{device.idle_watts:g} W", f"{device.active_watts:g} W"
            rows.append([f"`{name}`", rate, *watts])
    return _make.table(["device", "training, 10^9 MAC/s", "idle", "active"], rows, right=1)


def links() -> str:
    """Return the link profiles as a Markdown table, with what 10 kB up take."""
    head = "link", "down, Mbit/s", "up, Mbit/s", "latency", "loss", "may send", "10 kB up"
    rows = []
    for name in available("link"):
        if name not in OWN:
            link = build("link", name)
            sent = link.up(10_000, 0)
            rates = f"{link.downlink_mbps:g}", f"{link.uplink_mbps:g}"
            rest = f"{link.latency_s:g} s", f"{link.loss:.0%}", f"{link.uplink_duty:.0%}"
            took = f"{sent.seconds:.3g} s, {sent.joules:.2g} J"
            rows.append([f"`{name}`", *rates, *rest, took])
    return _make.table(head, rows, right=1)


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the page with the profiles of this version."""
    page = _make.with_made(PAGE.read_text(), "devices", devices())
    yield PAGE, _make.with_made(page, "links", links())
