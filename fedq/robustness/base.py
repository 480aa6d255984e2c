"""What an evaluation is: a registered frozen dataclass that looks at one run's model."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedq.robustness.outcome import Outcome
from fedq.robustness.subject import Subject

Family = Literal[
    "evasion", "corruption", "poisoning", "backdoor", "membership", "reconstruction", "privacy",
    "protocol",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """How an evaluation is to be done.

    Attributes:
      seed: All its randomness derives from it.
      folder: Its own, for what a killed evaluation need not compute again; created on use.
      workers: Processes that federations may use; 0 is one per core.
      step: Called with (done, of) as it goes on.
    """

    seed: int
    folder: Path
    workers: int = 0
    step: Callable[[int, int], None] = lambda done, of: None


class Evaluation(abc.ABC):
    """One question about a run; chosen by name in a suite (``conf/suite/``).

    Attributes:
      family: The part of the card it stands in.
    """

    group: ClassVar[str] = "evaluation"
    name: ClassVar[str]
    family: ClassVar[Family]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def unsuitable(self, subject: Subject) -> str:
        """Return why the evaluation does not apply to a run; empty if it does."""
        return ""

    @abc.abstractmethod
    def run(self, subject: Subject, work: Work) -> Sequence[Outcome]:
        """Return what was found.

        Raises:
          FedqError: If it cannot be done; the card says why, and goes on with the others.
        """
