"""The parity gate: nothing is released that its own runtime does not compute as training did.

It executes the written file on the test set, compares with the network with fake quantizers, its
biases as the file holds them and as trained, counts what the runtime computes in integers, and
refuses silent float fall-back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedq.errors import FedqError
from fedq.export._graph import Graph
from fedq.export.base import Exporter, Operators

#: Least share of examples with the same class, and most output steps between logits.
AGREEMENT, STEPS = 0.998, 1
#: Without classes this share of the outputs must be within ``STEPS``, and all within so many times
#: that: near ties add up over layers, and there are many outputs.
WITHIN, FAR = 0.99, 3


class ParityError(FedqError):
    """The exported file does not compute what was trained; it is not released.

    Attributes:
      parity: How it compares.
      trained: How it compares with the network as trained.
    """

    def __init__(self, message: str, parity: Parity, trained: Parity | None) -> None:
        super().__init__(message)
        self.parity, self.trained = parity, trained


@dataclass(frozen=True)
class Parity:
    """How a file compares.

    Attributes:
      examples: Of the test set.
      differing: Examples with another class than the trained network's; None if outputs are none.
      within: Share of outputs within ``STEPS``.
      largest_steps: Largest difference between logits, in steps of the output's grid.
      moved: Share of logits that differ at all.
      operators: What the runtime computes in integers, and in float.
      logits: (n, classes) float32, of the file.
    """

    examples: int
    differing: int | None
    within: float
    largest_steps: int
    moved: float
    operators: Operators
    logits: NDArray[np.float32]

    @property
    def agreement(self) -> float:
        """Share of examples with the same class; without classes, of outputs within a step."""
        return self.within if self.differing is None else 1 - self.differing / self.examples

    def failures(self, graph: Graph, steps: int = STEPS) -> list[str]:
        """Return what is wrong, in words; logits may differ by ``steps``."""
        found = []
        if self.operators.fallback:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.operators.fallback.items())
            found.append(f"the runtime falls back to float for {kinds}")
        count = sum(self.operators.integer.values())
        if count < len(graph.weighted):
            found.append(f"only {count} of {len(graph.weighted)} layers run in integers")
        if not np.isfinite(self.logits).all():
            found.append("it gives NaN or infinity")
        return found + self.apart(steps if self.differing is not None else FAR * steps)

    def apart(self, most: int | None) -> list[str]:
        """Return in which way outputs are too far apart: more than ``most`` steps, or too often."""
        found = []
        if most is not None and self.largest_steps > most:
            found.append(f"logits differ by {self.largest_steps} output steps, more than {most}")
        if self.differing is None and self.within < WITHIN:
            found.append(f"{1 - self.within:.1%} of the outputs differ by more than {STEPS} step")
        # One example of a small test set may stand at a tie.
        if self.differing is not None and self.differing > max(1, (1 - AGREEMENT) * self.examples):
            found.append(
                f"{self.differing} of {self.examples} examples get another class, more than"
                f" {1 - AGREEMENT:.1%}"
            )
        return found


def compare(
    exporter: Exporter,
    path: Path,
    graph: Graph,
    x: NDArray[np.float32],
    expected: NDArray[np.float32],
    *,
    classes: bool = True,
) -> Parity:
    """Execute a file and compare; see :meth:`Parity.failures`.

    Args:
      exporter: Whose runtime executes.
      path: The written file.
      graph: What was written.
      x: (n, *shape) float32, channels first, scaled.
      expected: (n, classes) float32 logits of the network with fake quantizers.
      classes: Whether the largest output is the answer.
    """
    logits = run(exporter, path, x)
    return parity_of(logits, expected, graph, exporter.operators(path), classes=classes)


def parity_of(
    logits: NDArray[np.float32],
    expected: NDArray[np.float32],
    graph: Graph,
    operators: Operators,
    *,
    classes: bool = True,
) -> Parity:
    """Compare what a file gave with what was expected; see :func:`compare`."""
    grid = graph.output.grid
    steps = np.rint((np.nan_to_num(logits, nan=1e30) - expected) / np.float32(grid.scale))
    return Parity(
        examples=len(logits),
        differing=int((logits.argmax(1) != expected.argmax(1)).sum()) if classes else None,
        within=float((np.abs(steps) <= STEPS).mean()),
        largest_steps=int(min(np.abs(steps).max(), 2.0**31)),
        moved=float((steps != 0).mean()),
        operators=operators,
        logits=logits,
    )


def check(
    parity: Parity,
    trained: Parity | None,
    graph: Graph,
    exporter: Exporter,
    steps: int = STEPS,
) -> None:
    """Raise :class:`ParityError` with all that is wrong, if anything is.

    Args:
      parity: Of the file, against the network with the biases that the file holds.
      trained: Against the network as trained; None if its grids are others.
      graph: What was written.
      exporter: Whose file it is.
      steps: Largest difference of a logit.
    """
    failures = parity.failures(graph, steps)
    if trained is not None and not failures:
        failures = [f"beside the network as trained {words}" for words in trained.apart(None)]
    if failures:
        raise ParityError(
            f"exporter={exporter.name} does not pass the parity gate, and nothing was released:"
            f" {'; '.join(failures)}",
            parity,
            trained,
        )


def run(exporter: Exporter, path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits of a file for inputs (n, *shape), one example at a time."""
    network = exporter.load(path)
    return np.concatenate([network(example).copy() for example in examples(exporter, x)])


def examples(exporter: Exporter, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return inputs one by one, in the runtime's order of axes."""
    if exporter.layout == "channels_last" and x.ndim > 2:
        x = np.moveaxis(x, 1, -1)
    return [np.ascontiguousarray(example[None]) for example in x]
