"""The process that trains: it stays, and what happens in it stays in it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedq import node
from fedq.errors import ConfigError
from fedq.fleet import flower
from fedq.fleet.link import RunOverError
from fedq.fleet.trainer import Trainer

# isort: split
from flwr.app import ConfigRecord, Context, Message, RecordDict


class Client:
    """Does what its request says, in place of training."""

    trained_images = 0

    def train(self, message: Message, context: Context) -> Message:
        todo = str(message.content["todo"]["todo"])  # type: ignore[index]
        if todo == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if todo == "refuse":
            raise ConfigError("not with this data")
        if todo == "raise":
            raise ValueError("wrong")
        if todo == "wait":
            time.sleep(1.5)
            self.trained_images += 300
        return Message(request(str(os.getpid())).content, reply_to=message)


def request(todo: str) -> Message:
    flower.TaskIdentity.run_id, flower.TaskIdentity.node_id = 1, 2
    flower.TaskIdentity.task_id = 0
    return Message(RecordDict({"todo": ConfigRecord({"todo": todo})}), 2, "train")


def context(**node_config: Any) -> Context:
    return Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={})


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    monkeypatch.setattr(node, "client_of", lambda context: Client())  # before the fork
    found = Trainer(idle_s=0.05)
    yield found
    found.close()


def said(reply: Message) -> str:
    if reply.has_error():
        return str(reply.error.reason)
    return str(reply.content["todo"]["todo"])  # type: ignore[index]


def test_one_process_answers_all_messages(trainer: Trainer) -> None:
    assert trainer.pid is None
    pids = {said(trainer.answer(request("pid"), context())) for _ in range(3)}
    assert pids == {str(trainer.pid)}
    assert int(pids.pop()) != os.getpid()


@pytest.mark.parametrize(
    ("todo", "reason"),
    [("refuse", "not with this data"), ("raise", "ValueError: wrong"), ("die", "SIGKILL")],
)
def test_what_goes_wrong_costs_one_reply(trainer: Trainer, todo: str, reason: str) -> None:
    reply = trainer.answer(request(todo), context())
    assert reply.has_error()
    assert reason in said(reply)
    assert said(trainer.answer(request("pid"), context())) == str(trainer.pid)


def test_a_long_training_shows_life(trainer: Trainer) -> None:
    seen: list[float] = []
    trainer.answer(request("wait"), context(), lambda: seen.append(time.monotonic()))
    assert seen


def test_a_training_that_is_for_nothing_is_ended(trainer: Trainer) -> None:
    def over() -> None:
        raise RunOverError("the run is over")

    first = said(trainer.answer(request("pid"), context()))
    with pytest.raises(RunOverError):
        trainer.answer(request("wait"), context(), over)
    assert trainer.pid is None
    assert said(trainer.answer(request("pid"), context())) != first


def test_without_work_the_memory_is_given_back(trainer: Trainer) -> None:
    first = said(trainer.answer(request("pid"), context()))
    time.sleep(0.1)
    trainer.rest()
    assert trainer.pid is None
    assert said(trainer.answer(request("pid"), context())) != first


def test_new_data_is_read(trainer: Trainer, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    data.write_bytes(b"of this morning")
    here = context(**{"data-path": str(data)})
    first = said(trainer.answer(request("pid"), here))
    assert said(trainer.answer(request("pid"), here)) == first
    data.write_bytes(b"and of this afternoon")
    assert said(trainer.answer(request("pid"), here)) != first
