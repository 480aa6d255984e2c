"""Work in threads: in order, in bounded memory, and the same mean to the bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from fedq import DecodeError, Layout, build, codecs
from fedq.errors import ConfigError
from fedq.strategy import FedQ
from fedq.threads import in_threads
from tests.grids import InlineGrid, constant_client

LAYOUT = Layout.of({"w": np.empty((40, 30)), "b": np.empty(40)})


def encoded(count: int) -> list[bytes]:
    codec, rng = build("codec", "uniform", bits=5, rounding="dithered"), np.random.default_rng(0)
    updates = rng.normal(size=(count, LAYOUT.size)) * 10.0 ** rng.integers(-4, 3, (count, 1))
    return [codec.encode(update, LAYOUT, seed) for seed, update in enumerate(updates)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_keep_their_order_and_few_items_are_under_way(threads: int) -> None:
    lock, asked, done = threading.Lock(), 0, 0
    most = 0

    def items() -> Iterator[int]:
        nonlocal asked, most
        for item in range(40):
            with lock:
                asked += 1
                most = max(most, asked - done)
            yield item

    def work(item: int) -> int:
        nonlocal done
        time.sleep(0.001 * (item % 3))
        with lock:
            done += 1
        return item * item

    assert list(in_threads(work, items(), threads)) == [i * i for i in range(40)]
    assert most <= threads + 1


def test_an_error_in_a_thread_is_the_caller_s() -> None:
    def work(item: int) -> int:
        return 1 // (item - 3)

    with pytest.raises(ZeroDivisionError):
        list(in_threads(work, range(9), threads=2))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fedq")]


def test_a_mean_of_payloads_has_no_order_and_no_threads() -> None:
    payloads, weights = encoded(12), list(range(1, 13))
    expected = codecs.mean(payloads, weights, LAYOUT)
    for threads in (1, 2, 4):
        for step in (1, -1):
            found = codecs.mean(iter(payloads[::step]), weights[::step], LAYOUT, threads=threads)
            assert found.tobytes() == expected.tobytes()
    decoded = np.stack([codecs.decode(payload, LAYOUT) for payload in payloads])
    np.testing.assert_allclose(expected, np.average(decoded, 0, weights), rtol=1e-6, atol=1e-9)


def test_a_mean_of_payloads_refuses_what_is_wrong() -> None:
    payloads = encoded(3)
    for weights in ([1, 2], [1, 2, 3, 4]):
        with pytest.raises(ConfigError, match="one weight"):
            codecs.mean(payloads, weights, LAYOUT)
    with pytest.raises(ConfigError, match="positive weight"):
        codecs.mean([], [], LAYOUT)
    with pytest.raises(ConfigError, match="threads"):
        codecs.mean(payloads, [1, 1, 1], LAYOUT, threads=0)
    with pytest.raises(DecodeError):
        codecs.mean([*payloads[:2], payloads[2][:-1]], [1, 1, 1], LAYOUT, threads=2)


@pytest.mark.parametrize("aggregator", ["mean", "median"])
def test_a_round_has_no_threads(aggregator: str) -> None:
    results = []
    for threads in (1, 2, 5):
        fedq = FedQ(
            layout=LAYOUT,
            codec=build("codec", "uniform", bits=5, rounding="dithered"),
            aggregator=build("aggregator", aggregator),
            threads=threads,
        )
        grid = InlineGrid(constant_client(LAYOUT), 9)
        after, report = fedq.run_round(grid, fedq.initial(np.zeros(LAYOUT.size, np.float32)))
        assert report.replies == 9
        results.append((after.weights.tobytes(), report.train_loss, report.uplink_bytes))
    assert len(set(results)) == 1
