"""The default engine: a Flower Grid over persistent worker processes on this machine.

Goals: the cost of a client update is its training; memory does not grow with clients; a client
that raises, hangs or dies costs its own reply only. Workers are forked once, after the data is
loaded, so they share it. What the server sends is written once into memory that all workers map; a
job is (node, offset, length). A reply comes back through memory that its worker shares with the
server, if it fits; a pipe says so. Two jobs are queued per worker, so that none waits for the
server. Replies stream in order of completion: the strategy's sum
does not depend on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from fedq.engines.base import Engine
from fedq.errors import ConfigError, FedqError
from fedq.registry import register

# isort: split
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # Message() reads it; not public

T = TypeVar("T")

QUEUED_PER_WORKER = 2
FIRST_NODE = 2  # Flower reserves 1 for the SuperLink
RUN_ID = 1
CLIENT_APP_RAISED_EXCEPTION = 2  # flwr's ErrorCode for an exception in the ClientApp
ORPHAN_CHECK_S = 1.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
GRACE_S = 2.0


@register("engine", "local")
class Local(Engine):
    """Clients run in worker processes of this machine, one torch thread each.

    Args:
      workers: Processes; 0 is one per CPU core that this process may use.
    """

    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= 1024:
            raise ConfigError(f"engine.workers must be 0 (all cores) to 1024, not {self.workers}")

    def run(self, server: Callable[[Grid], T], client: Callable[[], ClientApp], clients: int) -> T:
        """Run ``server`` over a :class:`LocalGrid`."""
        with LocalGrid(client, clients, workers=self.workers) as grid:
            return server(grid)


@dataclass
class _Job:
    """One message on its way through a worker."""

    number: int
    message: Message
    offset: int = 0
    length: int = 0


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    replies: mmap.mmap  # a slot for each job that may be queued
    queue: deque[_Job] = field(default_factory=deque)


class LocalGrid(Grid):
    """A Flower Grid whose nodes run in persistent forked processes.

    Args:
      client: Makes the ClientApp; called once in each worker.
      clients: Nodes in the federation; only those that get a message cost anything.
      workers: Worker processes; 0 is one per usable core.
      node_config: Added to every node's ``node_config``.

    Example:
      >>> def client():
      ...     app = ClientApp()
      ...     @app.train()
      ...     def train(message, context):
      ...         return Message(message.content, reply_to=message)
      ...     return app
      >>> with LocalGrid(client, clients=3, workers=1) as grid:
      ...     message = Message(RecordDict(), 2, "train")
      ...     len(list(grid.send_and_receive([message])))
      1
    """

    def __init__(
        self,
        client: Callable[[], ClientApp],
        clients: int,
        *,
        workers: int = 0,
        node_config: Mapping[str, Any] | None = None,
    ) -> None:
        if sys.platform == "win32":
            raise ConfigError("the local engine forks processes, which Windows cannot; use WSL 2")
        self._client = client
        self._nodes = range(FIRST_NODE, FIRST_NODE + clients)
        self._node_config = dict(node_config or {})
        self._count = workers or len(os.sched_getaffinity(0))
        self._workers: list[_Worker] = []
        self._replies = select.poll()  # the pipes of busy workers
        self._memory: mmap.mmap | None = None
        self._states: dict[int, RecordDict] = {}
        self._jobs = 0
        self._finished: dict[str, Message] = {}
        self._pushed: dict[str, _Job] = {}
        self._run = Run.create_empty(run_id=RUN_ID)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, 1

    # --- Flower's Grid -----------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Return the node identifiers, in the order of their partitions."""
        return self._nodes

    def get_nodes(self) -> list[NodeInfo]:
        """Return the nodes, in the order of their partitions."""
        return [NodeInfo(node_id=node) for node in self._nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages; their replies come from :meth:`pull_messages`."""
        numbers = []
        for message in messages:
            identifier = self._identify(message)
            numbers.append(identifier)
            self._pushed[identifier] = _Job(0, message)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to pushed messages, running those that wait."""
        wanted = set(message_ids)
        waiting = [self._pushed.pop(i).message for i in list(self._pushed)]
        for reply in self.send_and_receive(waiting):
            self._finished[reply.metadata.reply_to_message_id] = reply
        return [self._finished.pop(i) for i in sorted(wanted & self._finished.keys())]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield replies as they complete.

        After ``timeout`` seconds the iteration ends; workers still busy then are replaced.
        """
        jobs = deque(self._job(message) for message in messages)
        if not jobs:
            return
        self._write(jobs)
        # A job queued behind a hung client would miss the deadline with it; one that carries a
        # node's state may not fit the pipe while its worker sends a reply, and both would wait.
        depth = QUEUED_PER_WORKER if timeout is None and not self._states else 1
        deadline = None if timeout is None else time.monotonic() + timeout
        running: set[int] = {job.number for job in jobs}
        try:
            while running:
                self._feed(jobs, depth)
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return
                for pipe, _ in self._replies.poll(None if left is None else 1e3 * left):
                    worker = next(w for w in self._workers if w.pipe.fileno() == pipe)
                    job, reply = self._receive(worker)
                    running.discard(job.number)
                    self._feed(jobs, depth)  # first, so that no worker waits for aggregation
                    yield reply
        finally:
            if running:
                self._replace_busy()

    # --- workers -----------------------------------------------------------------------------

    def __enter__(self) -> LocalGrid:
        """Return the grid; workers start with the first message."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the workers."""
        self.close()

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            self._end(worker)
        self._workers = []
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _identify(self, message: Message) -> str:
        identifier = message.metadata.message_id or uuid.uuid4().hex
        message.metadata.__dict__["_message_id"] = identifier  # as Flower's own grids do
        return identifier

    def _job(self, message: Message) -> _Job:
        if message.metadata.dst_node_id not in self._nodes:
            raise ConfigError(f"there is no node {message.metadata.dst_node_id}")
        self._identify(message)
        self._jobs += 1
        return _Job(self._jobs, message)

    def _write(self, jobs: deque[_Job]) -> None:
        """Write each distinct content once into the memory that workers share."""
        contents: dict[int, tuple[int, int]] = {}
        pieces: list[bytes] = []
        end = 0
        for job in jobs:
            key = id(job.message.content)
            if key not in contents:
                data = pickle.dumps(job.message.content, protocol=pickle.HIGHEST_PROTOCOL)
                contents[key] = (end, len(data))
                pieces.append(data)
                end += len(data)
            job.offset, job.length = contents[key]
        # No worker reads any more: all replies of the last messages are in, or their workers gone.
        if self._memory is None or end > len(self._memory):
            self.close()
            self._memory = mmap.mmap(-1, max(2 * end, mmap.PAGESIZE))
        self._memory[:end] = b"".join(pieces)
        while len(self._workers) < self._count:
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        here, there = multiprocessing.Pipe()
        others = [worker.pipe for worker in self._workers] + [here]
        assert self._memory is not None
        replies = mmap.mmap(-1, QUEUED_PER_WORKER * len(self._memory))
        process = multiprocessing.get_context("fork").Process(
            target=_work,
            args=(
                there,
                others,
                self._memory,
                replies,
                self._client,
                self._node_config,
                self._nodes,
            ),
            daemon=True,
        )
        process.start()
        there.close()
        return _Worker(process, here, replies)

    def _feed(self, jobs: deque[_Job], depth: int) -> None:
        for length in range(depth):
            for worker in self._workers:
                if not jobs or len(worker.queue) > length:
                    continue
                job = jobs.popleft()
                # A worker that died since its last reply is found by the wait for its pipe.
                with contextlib.suppress(OSError):
                    self._send(worker, job)

    def _send(self, worker: _Worker, job: _Job) -> None:
        worker.queue.append(job)
        self._replies.register(worker.pipe, select.POLLIN)
        metadata = job.message.metadata
        state = self._states.get(metadata.dst_node_id)
        worker.pipe.send((job.number, metadata, job.offset, job.length, state))

    def _receive(self, worker: _Worker) -> tuple[_Job, Message]:
        try:
            number, offset, length, reply = worker.pipe.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        content, error, state = pickle.loads(reply or worker.replies[offset : offset + length])
        job = worker.queue.popleft()
        assert job.number == number
        if not worker.queue:
            self._replies.unregister(worker.pipe)
        if state is not None:
            self._states[job.message.metadata.dst_node_id] = state
        if error is not None:
            return job, self._error(job, error)
        return job, Message(content, reply_to=job.message)

    def _bury(self, worker: _Worker) -> tuple[_Job, Message]:
        """Replace a dead worker: the job it was at is lost, the next one goes to the new worker."""
        self._end(worker)
        code = worker.process.exitcode
        why = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        lost, *queued = worker.queue
        fresh = self._start()
        self._workers[self._workers.index(worker)] = fresh
        for job in queued:
            with contextlib.suppress(OSError):  # found by the poll of its pipe
                self._send(fresh, job)
        return lost, self._error(lost, f"the client's process died ({why})")

    @staticmethod
    def _error(job: _Job, reason: str) -> Message:
        return Message(Error(CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=job.message)

    def _replace_busy(self) -> None:
        for i, worker in enumerate(self._workers):
            if worker.queue:
                worker.process.kill()
                self._end(worker)
                self._workers[i] = self._start()

    def _end(self, worker: _Worker) -> None:
        if worker.queue:
            self._replies.unregister(worker.pipe)
        worker.process.join(GRACE_S)
        worker.process.kill()  # it may have closed its pipe and live on
        worker.process.join()
        worker.pipe.close()
        worker.replies.close()


def _work(
    pipe: Connection,
    others: list[Connection],
    memory: mmap.mmap,
    replies: mmap.mmap,
    make_client: Callable[[], ClientApp],
    node_config: dict[str, Any],
    nodes: range,
) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for other in others:  # else a pipe would outlive the server in its workers
        other.close()
    for name in ("fedq", "py.warnings"):  # the live display's lock may have been held at the fork
        logging.getLogger(name).handlers.clear()
    _keep_freed_memory()
    parent = os.getppid()
    requests = select.poll()  # pipe.poll() would make a selector for each job
    requests.register(pipe.fileno(), select.POLLIN)
    app: ClientApp | None = None
    done = 0
    while True:
        while not requests.poll(1e3 * ORPHAN_CHECK_S):
            if os.getppid() != parent:
                os._exit(1)
        try:
            number, metadata, offset, length, state = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        node = metadata.dst_node_id
        context = Context(
            run_id=RUN_ID,
            node_id=node,
            node_config={
                **node_config,
                "partition-id": node - FIRST_NODE,
                "num-partitions": len(nodes),
            },
            state=state if state is not None else RecordDict(),
            run_config={},
        )
        content: RecordDict | None = None
        reason: str | None = None
        try:
            TaskIdentity.node_id = node
            records = pickle.loads(memory[offset : offset + length])
            message = Message(content=records, metadata=metadata)  # type: ignore[call-overload]
            app = app or make_client()
            reply = app(message, context)
            content = reply.content if reply.has_content() else None
            reason = str(reply.error.reason) if reply.has_error() else None
        except Exception as error:
            own = isinstance(error, FedqError)
            reason = str(error) if own else f"{type(error).__name__}: {error}"
        state = context.state if len(context.state) else None
        outcome = pickle.dumps((content, reason, state), protocol=pickle.HIGHEST_PROTOCOL)
        # The next job but one comes after this reply has been read: two slots in turn are enough.
        slot = len(replies) // QUEUED_PER_WORKER
        done += 1
        at = done % QUEUED_PER_WORKER * slot
        if fits := len(outcome) <= slot:
            replies[at : at + len(outcome)] = outcome
        try:
            pipe.send((number, at, len(outcome), b"" if fits else outcome))
        except OSError:  # the server is gone
            os._exit(0)


def _keep_freed_memory() -> None:
    """Let malloc keep what is freed: to map activations anew in each step costs half a small step.

    By default glibc decides by what the process has freed so far, that is, by chance.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 256 << 20)
