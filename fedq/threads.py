"""Work for a few threads, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield ``function(item)`` of each item, in their order.

    At most ``threads`` items are worked on, and one more waits: an item is not asked for before
    there is room. The first is done in the caller's thread, so that whatever compiles itself has
    done so before there are threads; an engine may fork at any time.

    >>> list(in_threads(abs, [-1, 2, -3], threads=2))
    [1, 2, 3]
    """
    waiting: deque[Future[R]] = deque()
    source = iter(items)
    for first in source:
        yield function(first)
        break
    with ThreadPoolExecutor(threads, thread_name_prefix="fedq") as pool:
        for item in source:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
