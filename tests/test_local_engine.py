"""The local engine: any number of workers, and every way a client can die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedq import Layout
from fedq.codecs.identity import Identity
from fedq.engines.local import FIRST_NODE, LocalGrid
from fedq.errors import ConfigError
from fedq.strategy import FedQ
from tests.grids import constant_client, toy_app

# isort: split
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

LAYOUT = Layout.flat(50)
ZERO = np.zeros(50, np.float32)


def send(grid: LocalGrid, *nodes: int, timeout: float | None = None) -> dict[int, Message]:
    messages = [Message(RecordDict(), FIRST_NODE + n, "train") for n in nodes]
    replies = grid.send_and_receive(messages, timeout=timeout)
    return {reply.metadata.src_node_id - FIRST_NODE: reply for reply in replies}


def misbehave(message: Message, partition: int) -> Message:
    if partition == 1:
        raise ValueError("sensor is unplugged")
    if partition == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if partition == 3:
        time.sleep(60)
    return Message(RecordDict({"pid": ConfigRecord({"pid": os.getpid()})}), reply_to=message)


def toy() -> ClientApp:
    return toy_app(misbehave)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_exceptions_and_deaths_cost_one_reply(workers: int) -> None:
    with LocalGrid(toy, 10, workers=workers) as grid:
        replies = send(grid, 0, 1, 2, 4, 5, 6, 7)
        assert len(replies) == 7
        assert "ValueError: sensor is unplugged" in replies[1].error.reason
        assert "died (signal 9)" in replies[2].error.reason
        good = sorted(n for n, reply in replies.items() if not reply.has_error())
        assert good == [0, 4, 5, 6, 7]
        assert len(send(grid, *range(4, 10))) == 6  # and the grid still works


def test_workers_persist() -> None:
    with LocalGrid(toy, 10, workers=2) as grid:
        pids = {
            reply.content["pid"]["pid"] for _ in range(3) for reply in send(grid, 0, 4, 5).values()
        }
        assert len(pids) <= 2
        assert os.getpid() not in pids


def test_a_hung_client_does_not_hold_the_round() -> None:
    with LocalGrid(toy, 10, workers=2) as grid:
        replies = send(grid, 3, 4, 5, 6, timeout=2.0)
        assert set(replies) == {4, 5, 6}
        assert set(send(grid, 4, 5, 6, 7)) == {4, 5, 6, 7}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_same_result_for_any_number_of_workers(workers: int) -> None:
    fedq = FedQ(layout=LAYOUT, codec=Identity(), clients_per_round=9, seed=3)
    with LocalGrid(lambda: toy_app(constant_client(LAYOUT)), 20, workers=workers) as grid:
        state = fedq.initial(ZERO)
        for _ in range(3):
            state, report = fedq.run_round(grid, state)
            assert report.replies == 9
    inline = FedQ(layout=LAYOUT, codec=Identity(), clients_per_round=9, seed=3)
    from tests.grids import InlineGrid

    expected = inline.initial(ZERO)
    for _ in range(3):
        expected, _ = inline.run_round(InlineGrid(constant_client(LAYOUT), 20), expected)
    assert state.weights.tobytes() == expected.weights.tobytes()


def remember(message: Message, context: Context) -> Message:
    seen = context.state.get("n")
    count = int(seen["n"]) + 1 if isinstance(seen, ConfigRecord) else 1  # type: ignore[arg-type]
    context.state["n"] = ConfigRecord({"n": count})
    return Message(RecordDict({"n": ConfigRecord({"n": count})}), reply_to=message)


def remembering() -> ClientApp:
    app = ClientApp()
    app.train()(remember)
    return app


def test_context_state_follows_the_node_not_the_worker() -> None:
    with LocalGrid(remembering, 4, workers=2) as grid:
        for expected in (1, 2, 3):
            replies = send(grid, 0, 1, 2, 3)
            assert [replies[n].content["n"]["n"] for n in range(4)] == [expected] * 4


def test_one_client_cannot_change_what_the_next_receives() -> None:
    def edit(message: Message, partition: int) -> Message:
        before = message.content["x"]["v"]
        message.content["x"]["v"] = 99
        return Message(RecordDict({"y": ConfigRecord({"v": before})}), reply_to=message)

    with LocalGrid(lambda: toy_app(edit), 6, workers=1) as grid:
        content = RecordDict({"x": ConfigRecord({"v": 1})})
        messages = [Message(content, FIRST_NODE + n, "train") for n in range(6)]
        assert [r.content["y"]["v"] for r in grid.send_and_receive(messages)] == [1] * 6


def test_content_may_grow_between_rounds() -> None:
    def size(message: Message, partition: int) -> Message:
        n = len(message.content["x"]["v"])  # type: ignore[arg-type]
        return Message(RecordDict({"y": ConfigRecord({"n": n})}), reply_to=message)

    with LocalGrid(lambda: toy_app(size), 3, workers=2) as grid:
        for n in (10, 1000, 10_000_000, 5, 30_000_000):
            content = RecordDict({"x": ConfigRecord({"v": bytes(n)})})
            messages = [Message(content, FIRST_NODE + i, "train") for i in range(3)]
            assert [r.content["y"]["n"] for r in grid.send_and_receive(messages)] == [n] * 3


def test_big_states_and_replies_do_not_lock_the_pipes() -> None:
    def hoard(message: Message, context: Context) -> Message:
        context.state["x"] = ConfigRecord({"x": bytes(3_000_000)})
        return Message(RecordDict({"y": ConfigRecord({"y": bytes(3_000_000)})}), reply_to=message)

    def hoarding() -> ClientApp:
        app = ClientApp()
        app.train()(hoard)
        return app

    with LocalGrid(hoarding, 4, workers=1) as grid:
        for _ in range(3):
            assert len(send(grid, 0, 1, 2, 3)) == 4


def test_push_and_pull() -> None:
    with LocalGrid(toy, 10, workers=2) as grid:
        ids = grid.push_messages(Message(RecordDict(), FIRST_NODE + n, "train") for n in (0, 5))
        replies = grid.pull_messages(ids)
        assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)
        assert grid.pull_messages(ids) == []


def test_wrong_use_is_refused() -> None:
    with LocalGrid(toy, 2, workers=1) as grid:
        assert list(grid.send_and_receive([])) == []
        with pytest.raises(ConfigError, match="no node"):
            send(grid, 7)


def test_workers_end_with_their_server(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        """
import os, signal, sys
from fedq.engines.local import LocalGrid, FIRST_NODE
from flwr.app import Message, RecordDict, ConfigRecord
from flwr.clientapp import ClientApp
def make():
    app = ClientApp()
    @app.train()
    def train(message, context):
        return Message(RecordDict({"p": ConfigRecord({"p": os.getpid()})}), reply_to=message)
    return app
grid = LocalGrid(make, 4, workers=2)
messages = [Message(RecordDict(), FIRST_NODE + n, "train") for n in range(4)]
replies = list(grid.send_and_receive(messages))
print(*{r.content["p"]["p"] for r in replies}, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids, done.stderr
    assert _gone(pids, within_s=20)


def _gone(pids: list[int], within_s: float) -> bool:
    def alive(pid: int) -> bool:
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
        except OSError:
            return False

    return _until(lambda: not any(alive(pid) for pid in pids), within_s)


def _until(condition: Callable[[], bool], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()
