"""What a privacy mechanism is."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar


class Privacy(abc.ABC):
    """How updates are protected; frozen, registered, chosen by ``privacy=``."""

    group: ClassVar[str] = "privacy"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
