"""A network that loses packets: a namespace whose only link is a process that may forward them.

Real TCP on both ends, with its own retransmission and back-off. Needs root and ``/dev/net/tun``;
nothing of the machine's own network changes but two interfaces and a namespace, which end with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import threading
from pathlib import Path
from typing import Self

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 1500


def missing() -> str:
    """Return why there can be no such network here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "needs iproute2"
    return "" if Path("/dev/net/tun").exists() else "needs /dev/net/tun"


class LossyNetwork:
    """A namespace joined to this one.

    Args:
      loss: Probability with which each packet is lost, in either direction; may be changed.
      seed: Of what is lost.

    Attributes:
      prefix: Put before a command, it runs the command inside.
      host: This end's address, as the inside sees it.
    """

    def __init__(self, loss: float = 0.0, seed: int = 0) -> None:
        self.loss, self.packets, self.lost = loss, 0, 0
        self._random, self._ended = random.Random(seed), threading.Event()
        self._name = f"fq{os.getpid() % 10**8}"
        subnet = os.getpid() % 250
        self.host, inside = f"10.213.{subnet}.1", f"10.213.{subnet}.2"
        self.prefix = ["ip", "netns", "exec", self._name]
        ends = [f"{self._name}a", f"{self._name}b"]
        self._fds = [_tun(name) for name in ends]
        _ip("netns", "add", self._name)
        _ip("link", "set", ends[1], "netns", self._name)
        _ip("addr", "add", f"{self.host}/30", "dev", ends[0])
        _ip("link", "set", ends[0], "up")
        _ip("-n", self._name, "addr", "add", f"{inside}/30", "dev", ends[1])
        for name in (ends[1], "lo"):
            _ip("-n", self._name, "link", "set", name, "up")
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        for fd in self._fds:
            os.close(fd)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", self._name)

    def _forward(self) -> None:
        to = dict(zip(self._fds, reversed(self._fds), strict=True))
        while not self._ended.is_set():
            for fd in select.select(self._fds, [], [], 0.2)[0]:
                packet = os.read(fd, _MTU + 100)
                self.packets += 1
                if self._random.random() < self.loss:
                    self.lost += 1
                    continue
                with contextlib.suppress(OSError):  # an interface that is not up yet
                    os.write(to[fd], packet)


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
