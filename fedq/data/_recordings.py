"""From recordings of machines to normal and anomalous examples; shared by such sources."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedq.data.base import Dataset
from fedq.data.sound import FrontEnd
from fedq.errors import ConfigError
from fedq.metrics import recordings_auc

#: The deviation of a feature that is constant but for rounding.
_LEAST = 1e-4


@dataclass(frozen=True)
class Recording:
    """A stretch of sound or vibration: (n,) samples of one machine."""

    samples: NDArray[np.float32]
    machine: str
    anomalous: bool
    test: bool


def dataset(recordings: Iterable[Recording], front: FrontEnd, frames: int, hop: int) -> Dataset:
    """Return a reconstruction of frames in groups, the machines as clients.

    Every machine's features are standardised by its own training recordings, as a device at a
    machine does it: what tells machines apart is no anomaly. ``references`` has the AUC of the mean
    square of these features: what deviates, without a model (``magnitude_auc``).

    Args:
      recordings: In any order; those to train on are normal.
      front: Gives (frames, bins) features.
      frames: That one example holds.
      hop: Between the first frames of examples.

    Raises:
      ConfigError: If a recording has too few frames, or a machine none to train or test with.
    """
    x: dict[str, tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]] = {}
    y: dict[str, tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]] = {}
    for number, recording in enumerate(recordings):
        features = front(recording.samples)
        if len(features) < frames:
            raise ConfigError(
                f"a recording of machine {recording.machine} has {len(features)} frames; "
                f"data.frames={frames} needs more"
            )
        views = np.lib.stride_tricks.sliding_window_view(features, frames, axis=0)[::hop]
        inputs = x.setdefault(recording.machine, ([], []))
        truths = y.setdefault(recording.machine, ([], []))
        machine = list(x).index(recording.machine)
        inputs[recording.test].append(views.transpose(0, 2, 1).reshape(len(views), -1))
        row = [recording.anomalous, number, machine]
        truths[recording.test].append(np.tile(np.array(row, np.int64), (len(views), 1)))
    halves: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for machine_name, (train, test) in x.items():
        if not train or not test:
            what = "test" if train else "train"
            raise ConfigError(f"machine {machine_name} has no recordings to {what} with")
        own = np.concatenate(train)
        mean, deviation = own.mean(0, dtype=np.float64), own.std(0, dtype=np.float64)
        deviation[deviation < _LEAST] = 1.0
        for half, part in zip(halves, (own, np.concatenate(test)), strict=True):
            half.append(((part - mean) / deviation).astype(np.float32))
    if not x:
        raise ConfigError("there are no recordings")
    truths_train, truths_test = (
        np.concatenate([part for parts in y.values() for part in parts[half]]) for half in (0, 1)
    )
    tests = np.concatenate(halves[1])
    magnitude = np.square(tests, dtype=np.float64).mean(1)
    return Dataset.of(
        np.concatenate(halves[0]),
        truths_train,
        tests,
        truths_test,
        kind="features",
        client_train=truths_train[:, 2],
        task="reconstruction",
        references={"magnitude_auc": recordings_auc(truths_test, magnitude)},
    )
