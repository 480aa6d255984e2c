"""A device: one process that waits for work, hands it to the trainer and sends what comes back.

Flower's node starts two more processes and one per message, and polls every three seconds. This one
speaks the same Fleet API with the same keys, runs installed code only (what comes by wire are
messages, never a program), and survives more:

- Killed at any point, it comes back under its old registration and goes on with the message it was
  at: that message is on disk until its reply is with the server.
- Nothing on the network ends it. What somebody must do is one line in the log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import httpx

import fedq
from fedq import records  # noqa: F401  (sets what Flower reads at import)
from fedq.errors import FedqError
from fedq.fleet import flower, health
from fedq.fleet.artefacts import DIGEST, Artefacts, NotReleasedError
from fedq.fleet.files import Device, locked
from fedq.fleet.link import IDLE_HEARTBEAT_S, Link, RunOverError, StoppedError
from fedq.fleet.profile import Profile
from fedq.fleet.trainer import Trainer

# isort: split
from flwr.app import Context, Error, Message, RecordDict

LOG = logging.getLogger("fedq")
#: In the run configuration that the server's side of a fleet makes.
VERSION_KEY = "fedq-version"
#: Without a message for so long, a device is idle, and its heartbeats are few.
IDLE_AFTER_S = 300.0
OBJECT_WAIT_S, OBJECT_TRIES = 0.3, 400
#: How often a device that trains asks whether the run still goes on.
ASK_AGAIN_S = 60.0
#: The service manager restarts a device whose loop has not moved for so long.
STUCK_S = 240.0


def serve(device: Device) -> None:
    """Serve until a signal ends the process."""
    flower.require_known()
    device.state.mkdir(parents=True, exist_ok=True)
    with locked(device.root / "device.lock", f"the device {device.name} runs already"):
        node = _Node(device)
        with _signals(node.stopped):
            node.run()


def check(device: Device) -> int:
    """Return the device's node id if the server accepts it.

    Raises:
      FedqError: With the reason if it does not.
    """
    flower.require_known()
    link = Link(device, max_tries=1)
    try:
        return link.invoke(_go_on_line, link, device)
    finally:
        link.close()


def _go_on_line(link: Link, device: Device) -> int:
    """Bring the device on line under its registration and return its node id; tried once.

    Flower refuses to activate a node that it holds for on line, as it does for a while after a node
    was killed. A heartbeat under the old id does the same and is not refused.
    """
    known, interval_s = device.state / "node", device.heartbeat_s
    with contextlib.suppress(OSError, ValueError, httpx.HTTPStatusError):  # or another id since
        node = flower.Node(node_id=int(known.read_text()))
        request = flower.SendNodeHeartbeatRequest(node=node, heartbeat_interval=interval_s)
        if link.SendNodeHeartbeat(request).success:
            return int(node.node_id)
    activation = flower.ActivateNodeRequest(
        public_key=link.public_key, heartbeat_interval=interval_s
    )
    node_id = int(link.ActivateNode(activation).node_id)
    with contextlib.suppress(OSError):  # a full disk: after a kill it takes longer to come back
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(str(node_id))
    return node_id


def version_error(theirs: str, name: str) -> str | None:
    """Return what to do if the server has another minor version of fedq; None if it has not.

    >>> version_error("99.1.0", "pi-1").partition("; ")[2]
    'run fedq fleet upgrade pi-1'
    """
    own = fedq.__version__
    if theirs.split(".")[:2] == own.split(".")[:2]:
        return None
    return f"this device has fedq {own}, the server {theirs[:20]}; run fedq fleet upgrade {name}"


@dataclass
class _Node:
    device: Device
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.link = Link(self.device, self.stopped)
        self.trainer = Trainer(self.device.idle_s)
        self.inflight, self.sending, self.measured = (
            self.device.state / name for name in ("message", "reply", "profile.json")
        )
        self.soon = threading.Event()
        self.profile = Profile()
        self._learn(Profile.read(self.measured))
        self.artefacts = Artefacts(self.device.artefacts, self.device.ca.read_bytes())
        self.refused = ""
        if current := self.artefacts.current:
            self.link.report["artefact"] = current
        for key in ("weight-bits", "partition-id"):  # what decides the width of its weights
            if key in self.device.node:
                self.link.report[key.replace("-", "_")] = self.device.node[key]
        self.moved = self.asked = time.monotonic()
        self.worked = -math.inf
        self.runs: dict[int, dict[str, Any]] = {}
        self.node = flower.Node()

    def run(self) -> None:
        """Go on line, finish what was begun, and answer what comes."""
        LOG.info("%s connects to %s", self.device.name, self.device.server)
        try:
            self.link.invoke(self._arrive)
            threading.Thread(target=self._heartbeats, daemon=True).start()
            LOG.info("%s is on line as node %d", self.device.name, self.node.node_id)
            health.notify("READY=1\nSTATUS=waiting for work")
            self._resume()
            while not self.stopped.is_set():
                self._once()
        except StoppedError:
            pass
        finally:
            self.stopped.set()
            self.soon.set()
            self.trainer.close()
            self._leave()

    def _once(self) -> None:
        """Wait for a message and answer it."""
        asked = time.monotonic()
        response = self.link.invoke(self._ask)
        self.moved = time.monotonic()
        if response.messages_list:
            self._keep(response)
            self._answer(response)
        else:
            self.trainer.rest()
            self._run_release()
            if self.moved - asked < 0.05:  # a server that does not wait: Flower's own
                self.stopped.wait(3.0)

    def _arrive(self) -> None:
        """Go on line, and tell how fast the uplink is; tried once."""
        with contextlib.suppress(httpx.HTTPStatusError):  # what follows says what is wrong
            self._learn(self.profile.sent(*self.link.measure()))
        self._join()

    def _join(self) -> None:
        self.node = flower.Node(node_id=_go_on_line(self.link, self.device))

    def _ask(self) -> Any:
        try:
            return self.link.PullMessages(flower.PullMessagesRequest(node=self.node))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.UNAUTHORIZED:
                raise
            self._join()  # the server may know this device by another id now
            return self.link.PullMessages(flower.PullMessagesRequest(node=self.node))

    # --- one message ---------------------------------------------------------------------------

    def _answer(self, response: Any) -> None:
        """Train on a message and send the reply; on disk, the message waits until that is done."""
        metadata = response.messages_list[0].metadata
        if self._idle():
            self.soon.set()  # from now on the server should soon notice if this device goes
        self.worked = self.asked = time.monotonic()
        try:
            run_config = self._run_config(metadata.run_id)
            health.notify("STATUS=training")
            reply = self._reply(response, run_config)
            self._send(reply, metadata.run_id, metadata.created_at, metadata.ttl)
            self.link.invoke(self._confirm, metadata)
            LOG.info("round %s: replied", metadata.group_id or "?")
            if metadata.group_id.isdecimal():
                self.link.report["round"] = int(metadata.group_id)
        except RunOverError as error:
            LOG.warning("round %s: %s", metadata.group_id or "?", error)
            with contextlib.suppress(httpx.HTTPError):  # else it would be given again
                self._confirm(metadata)
        health.notify("STATUS=waiting for work")
        self._forget()
        self.profile.save(self.measured)
        self.moved = self.worked = time.monotonic()

    def _confirm(self, metadata: Any) -> None:
        request = flower.ConfirmMessageReceivedRequest(
            node=self.node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        self.link.ConfirmMessageReceived(request)

    def _learn(self, profile: Profile) -> None:
        if not Profile(up_bytes_s=profile.up_bytes_s).like(self.profile):
            self.soon.set()  # the next round may name another codec
        self.profile = profile
        self.link.report.update(profile.report())

    def _reply(self, response: Any, run_config: dict[str, Any]) -> Message:
        tree = response.message_object_trees[0]
        metadata = flower.message_from_proto(response.messages_list[0]).metadata
        flower.TaskIdentity.run_id = metadata.run_id
        flower.TaskIdentity.node_id = self.node.node_id
        flower.TaskIdentity.task_id = 0
        try:
            message = self._pull(metadata.run_id, tree)
        except FedqError as error:
            if isinstance(error, RunOverError | StoppedError):
                raise
            message = flower.message_from_proto(response.messages_list[0])
            return Message(Error(flower.ErrorCode.UNKNOWN, str(error)), reply_to=message)
        reason = version_error(str(run_config.get(VERSION_KEY, fedq.__version__)), self.device.name)
        if reason is not None:
            LOG.warning(reason)
            return Message(
                Error(flower.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message
            )
        context = Context(
            run_id=metadata.run_id,
            node_id=self.node.node_id,
            node_config={"state-dir": str(self.device.state), **self.device.node},
            state=RecordDict(),
            run_config=run_config,
        )
        reply = self.trainer.answer(message, context, self._alive)
        self._learn(self.profile.trained(*self.trainer.last))
        return reply

    def _run_config(self, run_id: int) -> dict[str, Any]:
        if run_id not in self.runs:
            request = flower.GetRunRequest(node=self.node, run_id=run_id)
            found = flower.run_from_proto(self.link.invoke(self.link.GetRun, request).run)
            self.runs = {run_id: dict(found.override_config)}
        return self.runs[run_id]

    def _pull(self, run_id: int, tree: Any) -> Message:
        contents = {}
        for part in flower.iterate_object_tree(tree):
            request = flower.PullObjectRequest(
                node=self.node, run_id=run_id, object_id=part.object_id
            )
            for _ in range(OBJECT_TRIES):
                found = self.link.invoke(self.link.PullObject, request)
                self.moved = time.monotonic()
                if not found.object_found:
                    raise FedqError("the message is not on the server any more")
                if found.object_available:
                    contents[part.object_id] = found.object_content
                    break
                self.stopped.wait(OBJECT_WAIT_S)  # the run is still sending it
            else:
                raise FedqError("the message was never completed")
        message = flower.inflate_object_from_contents(tree.object_id, contents)
        if not isinstance(message, Message):
            raise FedqError("the server sent something that is no message")
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def _send(self, reply: Message, run_id: int, sent_at: float, ttl: float) -> None:
        # With the times of its message, a reply that is made again after a kill is the same to the
        # byte: the server refuses a second one, but takes what is missing of the first.
        reply.metadata.created_at, reply.metadata.ttl = sent_at, ttl
        # So is the size of its pieces: what is measured now counts for the next one.
        flower.set_chunk_bytes(self.profile.chunk_bytes(self.device.chunk_bytes))
        reply.metadata.__dict__["_message_id"] = reply.object_id
        size_bytes, send_s = 0, 0.0
        with flower.no_object_id_recompute():
            begun = self._begun(reply)
            session, wanted = begun or self._begin(reply)
            for object_id, part in flower.get_all_nested_objects(reply).items():
                if object_id not in wanted:
                    continue
                request = flower.PushObjectRequest(
                    node=self.node,
                    run_id=run_id,
                    object_id=object_id,
                    object_content=part.deflate(),
                    session_id=session,
                )
                start = time.monotonic()
                stored = self.link.invoke(self.link.PushObject, request).stored
                self.moved = time.monotonic()
                size_bytes += len(request.object_content)
                send_s += self.moved - start
                if not stored and not begun:
                    raise RunOverError("the server does not take the reply any more")
        self._learn(self.profile.sent(size_bytes, send_s))

    def _begin(self, reply: Message) -> tuple[str, set[str]]:
        """Announce a reply; return the session in which the server wants which objects of it."""
        request = flower.PushMessagesRequest(
            node=self.node,
            messages_list=[flower.message_to_proto(flower.remove_content_from_message(reply))],
            message_object_trees=[flower.get_object_tree(reply)],
            clientapp_runtime_list=[time.monotonic() - self.worked],
        )
        pushed = self.link.invoke(self.link.PushMessages, request)
        session, wanted = str(pushed.session_id), sorted(pushed.objects_to_push)
        with contextlib.suppress(OSError):
            self.sending.write_text(json.dumps([reply.object_id, session, wanted]))
        return session, set(wanted)

    def _begun(self, reply: Message) -> tuple[str, set[str]] | None:
        """Return what :meth:`_begin` returned for this reply before a kill, None if it did not."""
        try:
            object_id, session, wanted = json.loads(self.sending.read_text())
        except (OSError, ValueError):
            return None
        return (session, set(wanted)) if object_id == reply.object_id else None

    # --- the model that the device runs ---------------------------------------------------------

    def _run_release(self) -> None:
        """Run the release that the server names, if it is another one; a refusal is final."""
        digest = self.link.release
        if digest in ("", self.artefacts.current, self.refused) or not DIGEST.fullmatch(digest):
            return
        health.notify("STATUS=taking in a release")
        try:
            state = self.artefacts.install(digest, partial(self.link.invoke, self._fetch))
            LOG.info("runs release %.12s from now on: %s", digest, state)
        except NotReleasedError as error:
            self.refused, state = digest, f"{digest[:12]} refused: {error}"
            LOG.warning("release %.12s is refused: %s; %s", digest, error, self._still())
        except OSError as error:
            self.refused, state = digest, f"{digest[:12]} refused: {error.strerror}"
            LOG.warning("release %.12s cannot be kept: %s; %s", digest, error, self._still())
        self.link.report |= {"artefact": self.artefacts.current, "artefact_state": state[:100]}
        self.moved = time.monotonic()
        self.soon.set()  # the server wants to know
        health.notify("STATUS=waiting for work")

    def _still(self) -> str:
        current = self.artefacts.current
        return f"{current[:12]} goes on" if current else "none runs"

    def _fetch(self, digest: str, name: str, offset: int) -> bytes:
        self.moved = time.monotonic()
        return self.link.fetch(digest, name, offset)

    # --- what survives a kill ------------------------------------------------------------------

    def _keep(self, response: Any) -> None:
        temporary = self.inflight.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(response.SerializeToString())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.inflight)
        except OSError as error:
            LOG.warning("cannot write to %s: %s; a kill now loses this round", temporary, error)

    def _resume(self) -> None:
        """Answer the message that this device was at when it ended."""
        try:
            response = flower.PullMessagesResponse.FromString(self.inflight.read_bytes())
        except FileNotFoundError:
            return
        except flower.ProtobufError:
            response = flower.PullMessagesResponse()
        if response.messages_list and response.message_object_trees:
            LOG.info("going on with the message of before")
            self._answer(response)
        self._forget()

    def _forget(self) -> None:
        for path in (self.inflight, self.sending):
            path.unlink(missing_ok=True)

    # --- signs of life -------------------------------------------------------------------------

    def _alive(self) -> None:
        """Called while training goes on; ends it if it is for nothing."""
        self.moved = time.monotonic()
        if self.stopped.is_set():
            raise StoppedError("asked to end")
        if self.moved - self.asked > ASK_AGAIN_S:
            self.asked = self.moved
            request = flower.GetRunRequest(node=self.node, run_id=flower.TaskIdentity.run_id)
            try:
                self.link.GetRun(request)
            except httpx.HTTPError as error:
                self.link.explain(error)  # raises if the run is over

    def _idle(self) -> bool:
        return time.monotonic() - self.worked > IDLE_AFTER_S

    def _heartbeats(self) -> None:
        while not self.stopped.is_set():
            interval_s = self.device.heartbeat_s
            if self._idle():
                interval_s = max(interval_s, IDLE_HEARTBEAT_S)
            request = flower.SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=interval_s)
            with contextlib.suppress(Exception):  # the main loop says what is wrong
                self.link.SendNodeHeartbeat(request)
            if time.monotonic() - self.moved < STUCK_S:
                health.notify("WATCHDOG=1")
            self.soon.wait(0.8 * interval_s)
            self.soon.clear()

    def _leave(self) -> None:
        """Say good-bye, once, unless there is a message to come back for."""
        if self.inflight.exists():
            self.link.close()
            LOG.info("%s ends and will go on with its message", self.device.name)
            return
        last = Link(self.device, max_tries=1)
        with contextlib.suppress(FedqError):
            last.invoke(
                last.DeactivateNode, flower.DeactivateNodeRequest(node_id=self.node.node_id)
            )
        last.close()
        self.link.close()
        LOG.info("%s is off line", self.device.name)


@contextmanager
def _signals(stopped: threading.Event) -> Iterator[None]:
    """End on SIGTERM and SIGINT; in a wait for work at once, else after the step at hand."""

    def stop(number: int, frame: FrameType | None) -> None:
        if not stopped.is_set():
            stopped.set()
            raise StoppedError("asked to end")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except StoppedError:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
