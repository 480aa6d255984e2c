"""Shadow federations, what their models say of every row, and the files that keep it."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedq.engines.recorder import Seen
from fedq.errors import FedqError
from fedq.experiment import Experiment
from fedq.export._source import outputs, source
from fedq.layout import Vector
from fedq.quantization.base import float_twin
from fedq.robustness import _federation as federation
from fedq.robustness._inference import Inside, Signals, confidence
from fedq.training import Trainer

LOG = logging.getLogger("fedq")

#: A shadow model below this share of the median's accuracy on its own rows has diverged.
DIVERGED = 0.8
_FEWEST = 3


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the models of one federation say of every row of a pool.

    Attributes:
      inside: (n,) the rows that it trained on.
      deployed: (n,) signals of its final quantized network.
      twin: (n,) signals of that network's float twin.
      rounds: (r, n) signals of the quantized global models of chosen rounds.
      rounds_twin: (r, n) in float.
      accuracy: Share of its own rows whose label it gives more than half, ().
    """

    inside: Inside
    deployed: Signals
    twin: Signals
    rounds: Signals
    rounds_twin: Signals
    accuracy: NDArray[np.float64]

    def of(self, kind: str) -> Signals:
        """Return signals by name, one row per model: (1, n) or (r, n)."""
        return np.atleast_2d(getattr(self, kind))


class Rounds:
    """Notes what the global models of chosen rounds say of examples.

    Args:
      trainer: Of the federation's network.
      x: (n, *shape) inputs.
      y: (n,) labels.
      chosen: Rounds.
    """

    def __init__(
        self, trainer: Trainer, x: NDArray[np.float32], y: NDArray[np.int64], chosen: list[int]
    ) -> None:
        self.trainer, self.x, self.y, self.chosen = trainer, x, y, chosen
        self._found: dict[int, tuple[Signals, Signals]] = {}

    def see(self, seen: Seen) -> None:
        """Take in a round."""
        if seen.round in self.chosen:
            self._found[seen.round] = tuple(
                signals(self.trainer, seen.weights, seen.state, self.x, self.y, twin=twin)
                for twin in (False, True)
            )  # type: ignore[assignment]

    def stacked(self, twin: bool) -> Signals:
        """Return (rounds, n) signals, quantized or in float."""
        rows = [self._found[number][twin] for number in sorted(self._found)]
        return np.stack(rows) if rows else np.empty((0, len(self.y)))


def signals(
    trainer: Trainer,
    weights: Vector,
    state: Vector,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    *,
    twin: bool = False,
) -> Signals:
    """Return the signals of examples under given weights, (n,)."""
    trainer.load(weights, state)
    return _signals(trainer.model.eval(), x, y, twin)


def _signals(
    network: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64], twin: bool
) -> Signals:
    with float_twin(network) if twin else nullcontext():
        return confidence(outputs(network, x), y)


class Shadows:
    """A run's recipe on random halves of a pool, each federation trained once and kept in a file.

    Args:
      experiment: The recipe; its seed is not used.
      pool: Rows.
      chosen: Rounds whose global models are kept, too.
      folder: For files.
      workers: Processes of a federation.
    """

    def __init__(
        self,
        experiment: Experiment,
        pool: federation.Pool,
        chosen: list[int],
        folder: Path,
        workers: int,
    ) -> None:
        self.experiment, self.pool, self.chosen = experiment, pool, chosen
        self.folder, self.workers = folder, workers

    def answers(self, seed: int, inside: Inside) -> Answers | None:
        """Return what a federation with this seed on these rows says; None if it gave no model."""
        path = self.folder / f"shadow-{seed:016x}.npz"
        if not path.exists():
            federation.save(path, **self._train(seed, inside))
        with np.load(path) as saved:
            return Answers(**saved) if "inside" in saved else None

    def _train(self, seed: int, inside: Inside) -> dict[str, Any]:
        recipe = self.experiment.replace(seed=seed)
        split = self.pool.split(inside)
        x, y = self.pool.inputs_of(split, inside), self.pool.labels
        rounds = Rounds(federation.trainer_of(recipe, split), x, y, self.chosen)
        try:
            tensors = federation.federate(
                recipe, split, self.folder / "federation", self.workers, rounds.see
            )
            network = source(recipe, tensors, recipe.quantization).network
        except FedqError as error:
            LOG.warning("a shadow federation gave no model: %s", error)
            return {}
        deployed = _signals(network, x, y, twin=False)
        answers = Answers(
            inside,
            deployed,
            _signals(network, x, y, twin=True),
            rounds.stacked(twin=False),
            rounds.stacked(twin=True),
            np.array((deployed[inside] > 0).mean()),
        )
        return vars(answers)


def sound(models: list[Answers | None]) -> dict[int, Answers]:
    """Return the shadow models that did not diverge, by place.

    Raises:
      FedqError: If fewer than three are left.
    """
    trained = {place: model for place, model in enumerate(models) if model is not None}
    usual = np.median([model.accuracy for model in trained.values()]) if trained else 0.0
    kept = {k: model for k, model in trained.items() if model.accuracy >= DIVERGED * usual}
    if len(kept) < _FEWEST:
        raise FedqError(
            f"{len(models) - len(kept)} of {len(models)} shadow federations diverged; raise "
            "shadows, or judge a recipe that trains"
        )
    return kept
