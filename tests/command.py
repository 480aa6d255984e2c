"""The ``fedq`` command, or a script, in a process of its own, which starts at once.

Such a process is forked from one that has imported all of fedq and done nothing (``python -m
tests.command``, one for all tests of a pytest process). It has its own pid, session, working
directory, environment and output, may be killed, and shares nothing with the tests. All that it
does without are the seconds of CPU that imports take.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, NoReturn

REPOSITORY = Path(__file__).parents[1]


class Command:
    """``fedq ARGUMENTS``, as ``subprocess.Popen`` would start it.

    Args:
      arguments: Of the command.
      cwd: Its working directory; this process's if not given.
      script: What to run in place of ``fedq``.
      own_session: Whether it leads a session, so that ``os.killpg`` reaches it and its workers.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path | None = None,
        script: Path | None = None,
        own_session: bool = False,
    ) -> None:
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self._said = ["", ""]
        self._ended, ends = os.pipe()
        self.returncode: int | None = None
        request = {
            "arguments": [*map(str, arguments)],
            "cwd": str(cwd or Path.cwd()),
            "script": script and str(script),
            "environment": dict(os.environ),
            "own_session": own_session,
        }
        files = [*(file.fileno() for file in self._files), ends]
        server = _server()
        socket.send_fds(server, [json.dumps(request).encode() + b"\n"], files)
        os.close(ends)
        self.pid = int(server.recv(100))

    def poll(self) -> int | None:
        """Its exit status, negative if a signal ended it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("fedq", timeout or 0)
            self.returncode = int(os.read(self._ended, 100))
            os.close(self._ended)
            self._said = [*map(_read, self._files)]
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return its output and its errors."""
        self.wait(timeout)
        out, err = self._said
        return out, err


def run(
    *arguments: object, timeout: float, cwd: Path | None = None, script: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``fedq ARGUMENTS``, or a script, to its end."""
    command = Command(*arguments, cwd=cwd, script=script)
    try:
        out, err = command.communicate(timeout)
    except BaseException:
        command.kill()
        raise
    return subprocess.CompletedProcess(["fedq", *map(str, arguments)], command.wait(), out, err)


def run_new(*arguments: object, cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``fedq ARGUMENTS`` as a user's shell does, in a new interpreter."""
    command = [sys.executable, "-m", "fedq.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout
    )


def _read(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


@cache
def _server() -> socket.socket:
    """The process that forks; it ends when this one has."""
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.command", str(number)],
        cwd=REPOSITORY,
        pass_fds=[number],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # called first
    assert ours.recv(100) == b"ready", "the process that forks does not start"
    return ours


# --- the process that forks ----------------------------------------------------------------------


def _serve(requests: socket.socket) -> None:
    _load()
    woken, wakes = socket.socketpair()
    for end in (woken, wakes):
        end.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for pytest
    running: dict[int, int] = {}
    requests.sendall(b"ready")
    while True:
        ready = select.select([requests, woken], [], [])[0]
        if woken in ready:
            woken.recv(4096)
            _tell_ends(running)
        if requests in ready:
            text, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
            if not text:
                return
            while not text.endswith(b"\n"):
                text += requests.recv(1 << 20)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for end in (requests, woken, wakes):
                    end.close()
                _become(files, **json.loads(text))
            *said, running[pid] = files
            for file in said:
                os.close(file)
            requests.sendall(str(pid).encode())


def _tell_ends(running: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ends = running.pop(found[0])
            with contextlib.suppress(BrokenPipeError):
                os.write(ends, str(os.waitstatus_to_exitcode(found[1])).encode())
            os.close(ends)


def _load() -> None:
    """Import what a run does and load the kernels of its codecs, without a thread: forks follow."""
    import numpy as np

    for name in ("cli", "optimize", "progress", "report", "simulation", "sweep"):
        import_module(f"fedq.{name}")
    import_module("matplotlib.backends.backend_agg")
    from fedq import config
    from fedq.aggregators.mean import MeanStream
    from fedq.layout import Layout

    experiment = config.load(["data=digits"])
    layout, x = Layout.of({"matrix": np.ones((8, 8))}), np.ones(64, np.float32)
    stream = MeanStream(x.size)
    for codec in (experiment.codec, experiment.downlink):
        stream.add(codec.decode(codec.encode(x, layout), layout), 1)
    stream.merge(stream)
    stream.result()
    gc.freeze()
    assert threading.active_count() == 1, threading.enumerate()


def _become(
    files: list[int],
    arguments: list[str],
    cwd: str,
    script: str | None,
    environment: dict[str, str],
    own_session: bool,
) -> NoReturn:
    """Be the command, in a process that was just forked."""
    if own_session:
        os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for file, number in zip(files, (1, 2), strict=False):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if script is not None:
        sys.argv[:], sys.path[0] = [script, *arguments], str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
        status = 0
    else:
        from fedq.cli import main

        status = main(arguments)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the interpreter's own end would copy all the pages that it shares


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
