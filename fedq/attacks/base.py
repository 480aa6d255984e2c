"""What an attack is."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar


class Attack(abc.ABC):
    """What hostile clients do; frozen, registered, chosen by ``attack=``."""

    group: ClassVar[str] = "attack"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
