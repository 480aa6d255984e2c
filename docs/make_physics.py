"""The tables of docs/physics.md: ``python docs/make_physics.py``."""

from __future__ import annotations

import re
from pathlib import Path

from fedq import available, build

PAGE = Path(__file__).parent / "physics.md"
OWN = {"measured", "ideal"}  # no profiles of something that exists


def devices() -> str:
    """Return the device profiles as a Markdown table."""
    lines = ["| device | training, 10^9 MAC/s | idle | active |", "|---|---:|---:|---:|"]
    for name in available("device"):
        if name not in OWN:
            device = build("device", name)
            rate = f"{device.training_macs_s / 1e9:.3g}"
            watts = f"{device.idle_watts:g} W | {device.active_watts:g} W"
            lines.append(f"| `{name}` | {rate} | {watts} |")
    return "\n".join(lines)


def links() -> str:
    """Return the link profiles as a Markdown table, with what 10 kB up take."""
    lines = [
        "| link | down, Mbit/s | up, Mbit/s | latency | loss | may send | 10 kB up |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in available("link"):
        if name not in OWN:
            link = build("link", name)
            sent = link.up(10_000, 0)
            rates = f"{link.downlink_mbps:g} | {link.uplink_mbps:g}"
            rest = f"{link.latency_s:g} s | {link.loss:.0%} | {link.uplink_duty:.0%}"
            took = f"{sent.seconds:.3g} s, {sent.joules:.2g} J"
            lines.append(f"| `{name}` | {rates} | {rest} | {took} |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """Return a page with its tables as they are now."""
    for name, made in (("devices", devices()), ("links", links())):
        begin, end = f"<!-- {name}: python docs/make_physics.py -->", f"<!-- end of {name} -->"
        whole = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        page = whole.sub(lambda _: f"{begin}\n{made}\n{end}", page)  # noqa: B023 - called at once
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
