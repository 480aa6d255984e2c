"""What a topology is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class Topology:
    """Who hears a client's reply; registered, frozen.

    Attributes:
      flat: Whether that is the server itself.
    """

    group: ClassVar[str] = "topology"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    flat: ClassVar[bool]
