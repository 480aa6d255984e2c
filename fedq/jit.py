"""Kernels compiled by Numba, and kept on disk where there is a place for them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numba


def jit(function: Any) -> Any:
    """Compile a function on its first call, without the interpreter's lock.

    Compiled code is cached beside the source, in the user's cache or in ``NUMBA_CACHE_DIR``. Where
    none of them can be written (a read-only image, a service without a home), every process
    compiles for itself; ``numba.njit(cache=True)`` would raise at import.

    Example:
      >>> jit(lambda x: x + 1)(2)
      3
    """
    compiled = numba.njit(nogil=True)(function)
    if not numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
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
    return numba.njit(nogil=True, inline="always")(function)
