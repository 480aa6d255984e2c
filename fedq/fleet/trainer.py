"""The process that trains: torch, the data and the model stay in it from round to round.

Flower starts a Python process for each message. This one is forked from the device's process at the
first message, ends when there has been no work for a while, and is forked again when it has died
(out of memory, most likely) or the data has changed. What ran in it cannot harm the device's link.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedq import records  # noqa: F401  (sets what Flower reads at import)
from fedq.errors import FedqError
from fedq.fleet.flower import ErrorCode, TaskIdentity

# isort: split
from flwr.app import Context, Error, Message

LOG = logging.getLogger("fedq")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
OOM_SCORE = 700


class TrainingError(FedqError):
    """A message's training failed; the reply says so."""


class Trainer:
    """Answers training requests in a process of its own.

    Args:
      idle_s: The process ends after so long without a request.
    """

    def __init__(self, idle_s: float = 600.0) -> None:
        self._idle_s = idle_s
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._used, self._data = 0.0, (0, 0)
        #: Examples that the last request was trained with, and how long it took, in seconds.
        self.last: tuple[int, float] = 0, 0.0

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process is not None else None

    def answer(
        self, message: Message, context: Context, alive: Callable[[], None] = lambda: None
    ) -> Message:
        """Return the reply to a request; an error reply where training fails or the process dies.

        Args:
          message: The request.
          context: The node's.
          alive: Called now and then while training goes on; what it raises ends the training.
        """
        try:
            reply = self._ask(message, context, alive)
        except TrainingError as error:
            LOG.warning("%s", error)
            reason = str(error)[:500]
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        self._used = time.monotonic()
        return reply

    def _ask(self, message: Message, context: Context, alive: Callable[[], None]) -> Message:
        data = _version(context.node_config.get("data-path"))
        if data != self._data:
            self.close()
            self._data = data
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._pipe is not None
        self.last = 0, 0.0
        try:
            self._pipe.send((message, context))
            while not self._pipe.poll(1.0):
                alive()
            answer, self.last = self._pipe.recv()
        except FedqError:
            self.close()  # its answer would be taken for that of another message
            raise
        except (EOFError, OSError):
            raise TrainingError(f"the training process died: {self._ending()}") from None
        if isinstance(answer, Message):
            return answer
        raise TrainingError(str(answer))

    def rest(self) -> None:
        """End the process if there was no work for long."""
        if self._process is not None and time.monotonic() - self._used > self._idle_s:
            LOG.info("no work for %.0f s: the trainer ends until there is some", self._idle_s)
            self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _start(self) -> None:
        self.close()
        fork = multiprocessing.get_context("fork")
        self._pipe, theirs = fork.Pipe()
        self._process = fork.Process(target=_work, args=(theirs, self._pipe), daemon=True)
        with (
            warnings.catch_warnings()
        ):  # Python 3.12: other threads run; the child uses none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def _ending(self) -> str:
        assert self._process is not None
        self._process.join(5)
        code = self._process.exitcode
        self.close()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"{name}, out of memory?" if name == "SIGKILL" else name
        return f"exit status {code}"


def _work(pipe: Connection, parents: Connection) -> None:
    parents.close()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        with contextlib.suppress(OSError):  # the kernel takes the trainer first, not the device
            Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from fedq.node import client_of

    while True:
        try:
            message, context = pipe.recv()
        except EOFError:
            os._exit(0)
        TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, context.node_id
        TaskIdentity.task_id = 0
        start, images = time.monotonic(), 0
        try:
            client = client_of(context)
            before = client.trained_images
            answer: Message | str = client.train(message, context)
            images = client.trained_images - before
        except FedqError as error:
            answer = str(error)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        try:
            pipe.send((answer, (images, time.monotonic() - start)))
        except OSError:
            os._exit(0)


def _version(path: object) -> tuple[int, int]:
    """Return what changes when a file of data changes."""
    if not isinstance(path, str):
        return 0, 0
    try:
        found = Path(path).stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
