"""Kernels compiled by Numba, and kept on disk where there is a place for them.

Where Numba cannot be imported (or ``FEDQ_JIT=off``), kernels run as plain Python and give the same
bytes: slowly for the entropy coders; what is worth it has a NumPy form beside its kernel.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import Any

try:
    if os.environ.get("FEDQ_JIT") == "off":
        raise ImportError("switched off")
    from numba import njit

    #: Whether kernels are compiled.
    COMPILED = True
except ImportError:
    COMPILED = False


def jit(function: Any = None, *, allocates: bool = True) -> Any:
    """Compile a function on its first call, without the interpreter's lock.

    Compiled code is cached beside the source, in the user's cache or in ``NUMBA_CACHE_DIR``. Where
    none of them can be written (a read-only image, a service without a home), every process
    compiles for itself; ``numba.njit(cache=True)`` would raise at import. Divisions are IEEE's, as
    in NumPy: a check for zero would keep loops from being vectorised.

    Args:
      function: What to compile; left out where the decorator has options.
      allocates: Whether the function creates arrays or slices. One that does not needs no reference
        counts, which cost two atomic operations for every array that is handed to a helper: its
        inner loops run two to three times as fast. It may call only functions of its kind.

    Example:
      >>> jit(lambda x: x + 1)(2)
      3
    """
    if function is None:
        return partial(jit, allocates=allocates)
    if not COMPILED:
        return function
    options: dict[str, Any] = {} if allocates else {"_nrt": False}
    compiled = njit(nogil=True, error_model="numpy", **options)(function)
    if hasattr(compiled, "enable_caching"):  # not under NUMBA_DISABLE_JIT
        with suppress(RuntimeError):  # "no locator available"
            compiled.enable_caching()
    return compiled


def inline(function: Any) -> Any:
    """Compile a function into each compiled function that calls it: calls cost, copies do not.

    Example:
      >>> square = inline(lambda x: x * x)
      >>> jit(lambda x: square(x) + 1)(2)
      5
    """
    if not COMPILED:
        return function
    return njit(nogil=True, error_model="numpy", inline="always")(function)


def warm_up() -> None:
    """Compile the kernels of codecs, aggregators and noise, and keep them where there is a place.

    It takes a minute or two after an installation, and a few seconds from then on. A process that
    finds the kernels on disk starts at once.
    """
    import numpy as np

    from fedq.aggregators.mean import MeanStream
    from fedq.layout import Layout
    from fedq.privacy._entropy import Entropy
    from fedq.privacy._samplers import discrete_gaussian, gaussian_table
    from fedq.registry import build, table

    matrix = np.arange(64, dtype=np.float32).reshape(8, 8)
    layout, x = Layout.of({"matrix": matrix}), matrix.ravel()
    stream = MeanStream(x.size)
    for name, codec in table("codec").items():
        for options in getattr(codec, "examples", ()):  # a plug-in may have none
            built = build("codec", name, **options)
            stream.add(built.decode(built.encode(x, layout), layout), 1)
    stream.merge(stream)
    stream.result()
    gaussian_table(1.0).sample(1, Entropy())
    discrete_gaussian(1, 1, Entropy())
    updates = np.tile(x, (8, 1))
    for name in table("aggregator"):
        build("aggregator", name)(updates, np.ones(8), x)
