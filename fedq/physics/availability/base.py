"""What an availability is: a function of client and time."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar


class Availability(abc.ABC):
    """Says when a client can be asked; registered, frozen."""

    group: ClassVar[str] = "availability"
    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @property
    def slot_s(self) -> float | None:
        """Seconds after which it may be another; None is never."""
        return None

    @abc.abstractmethod
    def available(self, client: int, seconds: float, seed: int) -> bool:
        """Whether a client can be asked.

        Args:
          client: Its place in the federation.
          seconds: Simulated time since the run began.
          seed: Of the run.
        """
