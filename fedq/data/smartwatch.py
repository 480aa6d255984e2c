"""Shoulder exercises seen by a smartwatch, Burns et al. 2018, https://arxiv.org/abs/1802.01489."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from fedq.data.base import Data, Dataset, check_fraction
from fedq.errors import ConfigError
from fedq.registry import register


@register("data", "smartwatch")
class Smartwatch(Data):
    """Load windows of the inertial recordings that ship in seglearn (Burns et al. 2018).

    140 recordings of 7 exercises by 10 subjects with either arm: acceleration and rotation, 6
    channels at 50 Hz. Each recording is cut in time: windows of its first part train, windows of
    its last part test, and no sample is in both. The natural partition is by subject.

    Args:
      window: Samples per window; 100 are two seconds.
      step: Samples between the starts of windows; less than ``window`` makes them overlap.
      test_fraction: The last part of every recording, held out.

    Example:
      >>> Smartwatch(window=128, step=64)  # inputs of shape (6, 128)
      Smartwatch(window=128, step=64, test_fraction=0.25)

    Reference:
      Burns et al. 2018, "Shoulder physiotherapy exercise recognition: machine learning the inertial
      signals from a smartwatch".
    """

    window: int = 100
    step: int = 50
    test_fraction: float = 0.25

    # Needs an extra, so that the law suite cannot count on it.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __post_init__(self) -> None:
        if self.window < 1 or self.step < 1:
            raise ConfigError("data.window and data.step must be at least 1 sample")
        check_fraction(self.test_fraction, "data.test_fraction")

    def load(self) -> Dataset:
        """Cut the recordings of the installed package into windows."""
        if find_spec("seglearn") is None:
            raise ConfigError("data=smartwatch needs seglearn: pip install -e '.[data-imu]'")
        from seglearn.datasets import load_watch

        watch = load_watch()
        parts: dict[str, list[tuple[Any, Any, Any]]] = {"train": [], "test": []}
        for signal, label, subject in zip(watch["X"], watch["y"], watch["subject"], strict=True):
            cut = len(signal) - round(self.test_fraction * len(signal))
            for part, piece in (("train", signal[:cut]), ("test", signal[cut:])):
                if len(piece) < self.window:
                    raise ConfigError(
                        f"a recording has {len(piece)} {part} samples, fewer than "
                        f"data.window={self.window}; use a shorter window"
                    )
                views = np.lib.stride_tricks.sliding_window_view(piece, self.window, axis=0)
                windows = views[:: self.step].transpose(0, 2, 1).astype(np.float32)
                ids = np.full(len(windows), label), np.full(len(windows), subject)
                parts[part].append((windows, *ids))
        x, y, clients = (np.concatenate(column) for column in zip(*parts["train"], strict=True))
        x_test, y_test, _ = (np.concatenate(column) for column in zip(*parts["test"], strict=True))
        return Dataset.of(x, y, x_test, y_test, kind="series", client_train=clients)
