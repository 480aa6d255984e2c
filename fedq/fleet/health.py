"""What a device says of itself: a few numbers, from the files in which Linux keeps them."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fedq
from fedq.threads import usable_cores

_PROC, _SYS = Path("/proc"), Path("/sys")


def report(proc: Path = _PROC, sysfs: Path = _SYS) -> dict[str, Any]:
    """Return versions, memory, load and, where there are sensors, temperature and throttling."""
    found: dict[str, Any] = {
        "fedq": fedq.__version__,
        "flwr": version("flwr"),
        "clock_s": round(time.time(), 1),
        "cores": usable_cores(),
    }
    with contextlib.suppress(OSError):
        found["load"] = round(os.getloadavg()[0], 2)
    with contextlib.suppress(OSError, ValueError, LookupError):
        found["memory_mb"] = memory_mb(proc=proc)
        rows = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        sizes = {row[0]: int(row[1]) // 1024 for row in rows}
        found["free_mb"], found["ram_mb"] = sizes["MemAvailable:"], sizes["MemTotal:"]
    with contextlib.suppress(OSError, ValueError):
        milli = (sysfs / "class/thermal/thermal_zone0/temp").read_text()
        found["temperature_c"] = round(int(milli) / 1000, 1)
    with contextlib.suppress(OSError, ValueError):
        # The firmware of a Raspberry Pi: under-voltage, capped frequency, throttling.
        bits = (sysfs / "devices/platform/soc/soc:firmware/get_throttled").read_text()
        found["throttled"] = int(bits, 16)
    return found


def memory_mb(pid: int | str = "self", proc: Path = _PROC) -> int:
    """Return the resident memory of a process and its children, in MB (10^6 bytes)."""
    total, waiting = 0, [str(pid)]
    while waiting:
        one = waiting.pop()
        total += int((proc / one / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError):
            number = str(os.getpid()) if one == "self" else one
            waiting += (proc / one / "task" / number / "children").read_text().split()
    return total // 10**6


def peak_mb() -> int:
    """Return the most resident memory that this process has had, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6


def notify(text: str) -> None:
    """Tell systemd (``sd_notify``) if it started this process; nothing otherwise."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        end.sendall(text.encode())
