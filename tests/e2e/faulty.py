"""A device's real process, and what can go wrong in it, switched by files while it runs.

``python -m tests.e2e.faulty DIRECTORY`` is ``fedq fleet node DIRECTORY``. In ``DIRECTORY/faults/``:

===========  =========================================================================
``die``      one of :data:`STEPS`, at which the process is killed (SIGKILL), once
``clock``    seconds by which the device's clock is ahead
``garbage``  anything: what it sends in place of an update
``memory``   MB that the trainer may still take (RLIMIT_AS), and it wants 200
``oom``      anything: the kernel takes the trainer
``version``  the version of fedq that is installed
===========  =========================================================================
"""

from __future__ import annotations

import datetime
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedq
from fedq import client, records

# isort: split
from flwr.app import Context, Message

#: Names of steps, in the order in which a device takes them.
STEPS = ("waiting", "given", "training", "uploading", "uploaded")


def main(root: Path) -> None:
    faults = root / "faults"

    def read(name: str) -> str | None:
        try:
            return (faults / name).read_text()
        except OSError:
            return None

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(step: str, call: Callable[..., Any], when: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if read("die") != step:
                return call(*arguments, **options)
            (faults / "die").unlink()
            if when == "before":
                die()
            if when == "amid":
                threading.Timer(0.03, die).start()
            result = call(*arguments, **options)
            die()
            return result

        return wrapped

    if (version := read("version")) is not None:
        fedq.__version__ = version
    from flwr.supernode import node_auth_http_interceptor as signed

    from fedq.cli import main as cli
    from fedq.fleet import device, link, trainer

    true, clock = signed.now, time.time

    def off_s() -> float:
        return float(read("clock") or 0)

    signed.now = lambda: true() + datetime.timedelta(seconds=off_s())
    link.time.time = lambda: clock() + off_s()  # type: ignore[assignment]

    for step, owner, name, when in (
        ("waiting", device._Node, "_ask", "amid"),
        ("given", device._Node, "_keep", "before"),
        ("training", trainer.Trainer, "answer", "amid"),
        ("uploading", link.Link, "PushObject", "after"),
        ("uploaded", link.Link, "ConfirmMessageReceived", "before"),
    ):
        setattr(owner, name, dying(step, getattr(owner, name), when))

    honest = client.Client.train

    def train(self: client.Client, message: Message, context: Context) -> Message:
        if read("oom") is not None:
            die()
        if (more_mb := read("memory")) is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (used + int(more_mb) * 10**6, hard))
            bytearray(200 * 10**6)
        words = read("garbage")
        if words is None:
            return honest(self, message, context)
        return Message(records.pack(words.encode()), reply_to=message)

    client.Client.train = train  # type: ignore[method-assign]
    sys.exit(cli(["fleet", "node", str(root)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
