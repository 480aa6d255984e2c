"""TensorBoard: ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedq.registry import register
from fedq.trackers.base import Sink, Tracker


@register("tracker", "tensorboard")
class TensorBoard(Tracker):
    """Event files in ``RUN/tensorboard``.

    Reference:
      torch.utils.tensorboard.
    """

    extra: ClassVar[str] = "track-tensorboard"
    module: ClassVar[str] = "tensorboard"

    def open(self, path: Path, name: str, config: Mapping[str, Any]) -> Sink:
        """Return a writer of event files; a resumed run adds one."""
        return _Sink(path / "tensorboard")


class _Sink(Sink):
    def __init__(self, folder: Path) -> None:
        from torch.utils import tensorboard

        writer: Any = tensorboard.SummaryWriter
        self._writer = writer(str(folder))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self, figures: Mapping[str, float]) -> None:
        self._writer.close()
