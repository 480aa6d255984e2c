"""The errors that fedq raises on purpose; any other exception is a bug of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedqError(Exception):
    """A failure explained in one line that says what to do (exit status 1)."""


class ConfigError(FedqError, ValueError):
    """Wrong use: an unknown name, an ill-typed or out-of-range value (exit status 2)."""


class DecodeError(FedqError, ValueError):
    """A peer's bytes are malformed; nothing was allocated or changed for them."""


def unknown(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return the error for an unknown name, with the nearest valid one.

    >>> print(unknown("codec", "unifrom", ["identity", "uniform"]))
    unknown codec 'unifrom'; did you mean 'uniform'? (valid: identity, uniform)
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    valid = f"(valid: {', '.join(names)})" if names else "(none is valid here)"
    return ConfigError(f"unknown {kind} '{name}'{hint} {valid}")
