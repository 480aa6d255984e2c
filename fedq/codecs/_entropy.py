"""Entropy-coded integers in chunks of bounded size: one coder's memory, several threads.

A chunk is a run of whole rows of at most 2**20 integers (longer rows are cut) with a coder state of
its own. Both ends derive the borders from the geometry.

Body: varint length of each chunk but the last; then the chunks. A model of one chunk pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedq import wire
from fedq.codecs import _range, _rans
from fedq.errors import DecodeError

Integers = NDArray[np.int32]
Tensors = Sequence[tuple[int, int]]
#: Smallest bytes, no coder, or highest speed; the order is wire format.
Profile = Literal["max", "packed", "fast"]
#: Integers per chunk, at most.
CHUNK = 1 << 20

_CODERS = {"max": _range, "fast": _rans}

Job = TypeVar("Job")
Result = TypeVar("Result")


def encode(
    values: Integers,
    tensors: Tensors,
    limit: int,
    side: NDArray[np.uint8] | None = None,
    *,
    profile: Profile,
    threads: int = 1,
) -> bytes | None:
    """Code integers; None if that takes more than ``limit`` bytes, or the profile has no coder.

    Args:
      values: (n,) int32.
      tensors: Size and columns of each tensor in turn; the sizes add up to n.
      limit: Bytes at most.
      side: (n,) what both ends know, see :func:`fedq.codecs._range.encode`.
      profile: Which coder.
      threads: At most; the bytes are the same for any number.
    """
    coder = _CODERS.get(profile)
    if coder is None:
        return None
    parts = _parts(tensors, side)
    bodies = _map(
        lambda part: coder.encode(values[part[1]], part[0], limit, part[2]), parts, threads
    )
    whole = [body for body in bodies if body is not None]
    if len(whole) < len(bodies):
        return None
    joined = b"".join([wire.varint(len(body)) for body in whole[:-1]] + whole)
    return joined if len(joined) <= limit else None


def decode(
    body: bytes | memoryview,
    tensors: Tensors,
    side: NDArray[np.uint8] | None = None,
    *,
    profile: Profile,
    threads: int = 1,
) -> Integers:
    """Decode the integers of :func:`encode`, (n,) int32.

    Raises:
      DecodeError: If the body is not the one code of its integers.
    """
    coder = _CODERS.get(profile)
    if coder is None:
        raise DecodeError(f"entropy={profile} has no coder, and the codes are not packed")
    parts = _parts(tensors, side)
    reader = wire.Reader(body)
    lengths = [reader.varint() for _ in parts[1:]]
    bodies = [*map(reader.take, lengths), reader.rest()]
    values = np.empty(sum(size for size, _ in tensors), np.int32)

    def work(job: tuple[memoryview, _Part]) -> None:
        chunk, (geometry, place, known) = job
        values[place] = coder.decode(chunk, geometry, known)

    _map(work, list(zip(bodies, parts, strict=True)), threads)
    return values


def chunks(tensors: Tensors) -> list[list[tuple[int, int]]]:
    """Return the geometry of each chunk; there is at least one.

    >>> chunks([(3 << 19, 1 << 18), (10, 5)])
    [[(1048576, 262144)], [(524288, 262144), (10, 5)]]
    """
    result: list[list[tuple[int, int]]] = [[]]
    room = CHUNK
    for size, columns in tensors:
        width = min(max(columns, 1), CHUNK)
        while size:
            take = min(size, room // width * width)
            if take:
                result[-1].append((take, width))
                size, room = size - take, room - take
            if size:
                result.append([])
                room = CHUNK
    return result


_Part = tuple[list[tuple[int, int]], slice, NDArray[np.uint8] | None]


def _parts(tensors: Tensors, side: NDArray[np.uint8] | None) -> list[_Part]:
    """Return geometry, place and side information of each chunk."""
    pieces = chunks(tensors)
    ends = accumulate((sum(size for size, _ in piece) for piece in pieces), initial=0)
    places = [slice(start, end) for start, end in pairwise(ends)]
    return [
        (piece, place, None if side is None else side[place])
        for piece, place in zip(pieces, places, strict=True)
    ]


def _map(work: Callable[[Job], Result], jobs: Sequence[Job], threads: int) -> list[Result]:
    """Apply in order; kernels let go of the interpreter's lock."""
    if min(threads, len(jobs)) < 2:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
        return list(pool.map(work, jobs))
